"""The picture of a run's losses, loss.png."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from gpt.training.metrics import read_metrics

Curve = tuple[list[int], list[float]]  # steps and values


def save_loss_curve(metrics_path: Path, png_path: Path) -> None:
    """Plot the training and validation losses of a metrics.jsonl; nothing if it has none."""
    records = read_metrics(metrics_path)
    training = curve_of(records, "loss")
    validation = curve_of(records, "val_loss")
    if not training[0] and not validation[0]:
        return
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    plot_losses(figure.subplots(), training, validation)
    unfinished = png_path.with_suffix(".new")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, png_path)


def curve_of(records: list[dict[str, Any]], name: str) -> Curve:
    """Steps and values of one metric, where it was a number."""
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def plot_losses(axes: Any, training: Curve, validation: Curve) -> None:
    """Both curves on `axes`: each batch faint, their running mean over it, validation on top."""
    blue, orange = "#3b6ea8", "#d9702f"
    steps, losses = training
    axes.plot(steps, losses, color=blue, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color=blue, linewidth=1.8, label="training")
    axes.plot(*validation, "o-", color=orange, linewidth=1.6, markersize=4, label="validation")
    axes.set(xlabel="optimizer steps", ylabel="loss, nats per token")
    if validation[0]:
        title = f"Validation loss {validation[1][-1]:.3f} after {validation[0][-1]:,} steps"
    else:
        title = f"Training loss {losses[-1]:.3f} after {steps[-1]:,} steps"
    axes.set_title(title, loc="left", fontsize=11, pad=10)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.margins(x=0.01)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def smoothed(values: list[float]) -> list[float]:
    """The mean over a twentieth of `values` around each; less at both ends, so that the curve never
    lags."""
    n = len(values)
    i = np.arange(n)
    reach = np.minimum(np.minimum(i, n - 1 - i), n // 40)
    sums = np.cumsum([0.0, *values])
    return ((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)).tolist()
