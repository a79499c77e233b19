"""The plot of a run's losses, loss.png."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from gpt.training.metrics import read_metrics


def save_loss_curve(metrics_path: Path, png_path: Path) -> Any:
    """Plot the losses in a metrics.jsonl: batch losses as a faint line, their running mean, and
    validation losses. Returns the matplotlib figure, or None without losses."""
    records = read_metrics(metrics_path)
    steps, losses = curve_of(records, "loss")
    val_steps, val_losses = curve_of(records, "val_loss")
    if not steps and not val_steps:
        return None
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    blue, orange = "#3b6ea8", "#d9702f"
    axes.plot(steps, losses, color=blue, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color=blue, linewidth=1.8, label="training")
    axes.plot(
        val_steps, val_losses, "o-", color=orange, linewidth=1.6, markersize=4, label="validation"
    )
    axes.set(xlabel="optimizer steps", ylabel="loss, nats per token")
    if val_steps:
        title = f"Validation loss {val_losses[-1]:.3f} after {val_steps[-1]:,} steps"
    else:
        title = f"Training loss {losses[-1]:.3f} after {steps[-1]:,} steps"
    axes.set_title(title, loc="left", fontsize=11, pad=10)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.margins(x=0.01)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

    unfinished = png_path.with_suffix(".new")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, png_path)
    return figure


def curve_of(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, wherever it is a number."""
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: list[float]) -> list[float]:
    """The running mean of `values` over a twentieth of them. The window is centred, so the curve
    does not lag, and narrows at both ends."""
    n = len(values)
    i = np.arange(n)
    reach = np.minimum(np.minimum(i, n - 1 - i), n // 40)
    sums = np.cumsum([0.0, *values])
    return ((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)).tolist()
