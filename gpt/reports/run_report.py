"""The report: how runs learned, as one HTML page.

Top to bottom: reading a run's folder, the page, its charts. A run may still be training, so
a torn last line is skipped, and anything not written yet is left out.
"""

import io
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib import rc_context
from matplotlib.figure import Figure

from gpt import checkpoint
from gpt.errors import UserError, require
from gpt.reports.html import build_page, escape, read_asset, table
from gpt.training.loss_curve import curve_of, smoothed
from gpt.training.metrics import read_metrics

MAX_SAMPLES = 12
MAX_SAMPLE_CHARACTERS = 2000


# Reading a run's folder


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    `records`: the lines of metrics.jsonl and evaluations.jsonl, by step. `restarts`: the steps the
    run was resumed from. `seconds`: training time of all its processes. `samples`: (step, text).
    `settings`: the newest good checkpoint's, by dotted name, plus the training text; `note` says
    why any are missing. `tokenizer`: its file, if any. `last_written`: when the run last logged.
    """

    name: str
    records: list[dict[str, Any]]
    restarts: list[int]
    seconds: float
    samples: list[tuple[int, str]]
    settings: dict[str, Any]
    note: str
    tokenizer: bytes | None
    last_written: datetime | None

    @property
    def task_figures(self) -> dict[str, dict[str, Any]]:
        """The last record of each figure on a task, such as hellaswag/acc."""
        found = {}
        for record in self.records:
            found |= {name: record for name in record if "/" in name and "_stderr" not in name}
        return found


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs, named by folder, or by path if two folders share a name; UserError if a
    folder holds no run."""
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        require(folder.is_dir(), f"no folder {folder}: expected a run's folder made by train.py")
        path = folder / "metrics.jsonl"
        records = [*read_metrics(path), *read_metrics(folder / "evaluations.jsonl")]
        records.sort(key=lambda record: record["step"])
        require(
            bool(records or checkpoint.saved_steps(folder)),
            f"{folder} holds neither metrics.jsonl nor a checkpoint: expected a run's folder",
        )
        # The last line of each process, by the step it resumed from.
        last_lines = {r["since_step"]: r for r in records if "since_step" in r}

        # Evenly spaced samples, including the last one.
        written = read_metrics(folder / "samples.jsonl")
        chosen = np.linspace(0, len(written) - 1, min(len(written), MAX_SAMPLES), dtype=int)
        samples = [(written[i]["step"], written[i]["text"][:MAX_SAMPLE_CHARACTERS]) for i in chosen]
        settings, note = read_settings(folder)
        last_written = None
        if path.exists():
            last_written = datetime.fromtimestamp(path.stat().st_mtime)
        tokenizer = folder / "tokenizer.json"
        runs.append(
            Run(
                name=name if names.count(name) == 1 else str(folder),
                records=records,
                restarts=list(last_lines)[1:],
                seconds=sum(line["seconds"] for line in last_lines.values()),
                samples=samples,
                settings=settings,
                note=note,
                tokenizer=tokenizer.read_bytes() if tokenizer.exists() else None,
                last_written=last_written,
            )
        )
    return runs


def read_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """The settings of a run, and a note if some are missing."""
    if not checkpoint.saved_steps(folder):
        return {}, "it has no checkpoint yet, which is where settings are stored"
    try:
        _, metadata, _ = checkpoint.latest_good(
            folder, lambda step: checkpoint.read_metadata(folder, step)
        )
    except UserError as error:
        return {}, f"its settings cannot be read: {error}"
    settings = flatten_dict(metadata["train"], sep=".")
    if "source" in metadata:
        models_own = {name: value for name, value in settings.items() if name.startswith("model.")}
        return models_own, "it was imported and not trained here: only its model's settings exist"
    settings["text"] = " ".join(metadata["data"]["paths"]) or "Python's standard library"
    settings["fingerprint of text and tokenizer"] = metadata["data"]["fingerprint"][:12]
    settings["init_from"] = metadata["init_from"]
    return settings, ""


# The page


def build_report(runs: Sequence[Run]) -> str:
    heading = "Run report: " + ", ".join(run.name for run in runs)

    # Each run's progress and speed, a column per run.
    columns = [summarize(run) for run in runs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    summary = table(["", *run_names(runs)], rows, "numbers")
    for run in runs:
        if run.note:
            summary += f'<p class="soft">{escape(run.name)}: {escape(run.note)}.</p>'

    # Also chart each task figure that a run has at several steps.
    titles = list(CHARTS)
    for run in runs:
        for name in run.task_figures:
            steps, _ = curve_of(run.records, name)
            if len(set(steps)) > 1 and name not in titles:
                titles.append(name)

    # The loss is per token, so it cannot be compared between tokenizers.
    charts = ""
    if len({run.tokenizer for run in runs} - {None}) > 1:
        titles.remove("Loss")
        charts = (
            '<p class="soft">The runs have different tokenizers, so their losses per token cannot '
            "be compared; bits per byte can.</p>\n"
        )
    for title in titles:
        figure = draw_chart(title, runs)
        if figure:
            charts += f'<figure class="chart">{to_svg(figure, title)}</figure>\n'

    body = Template(read_asset("report.html")).substitute(
        heading=escape(heading),
        summary=summary,
        charts=charts or "<p>No step has been logged yet.</p>",
        tasks=tasks_section(runs),
        samples=samples_section(runs),
        settings=settings_section(runs),
    )
    return build_page(heading, body)


def run_names(runs: Sequence[Run]) -> list[str]:
    """Table heads for one column per run: each run's name after its curve color."""
    colors = [f"--run-{i % len(COLORS)}" for i in range(len(runs))]
    return [
        f'<span class="swatch" style="background: var({color})"></span>{escape(run.name)}'
        for run, color in zip(runs, colors, strict=True)
    ]


def summarize(run: Run) -> dict[str, str]:
    """A run's progress and speed, as HTML by label."""
    # The step reached and, if the run is not complete, the time of its last update.
    reached = max((record["step"] for record in run.records), default=0)
    total = run.settings.get("steps")
    steps = f"{reached:,} of {total:,}" if total else f"{reached:,}"
    if reached == total:
        steps = f"{total:,}, complete"
    elif run.last_written:
        steps += f"<br><small>last update {run.last_written:%Y-%m-%d %H:%M}</small>"

    def show(metric: str, form: str, reduce: Callable = lambda values: values[-1]) -> str:
        _, values = curve_of(run.records, metric)
        return form.format(reduce(values)) if values else "–"

    val_losses = zip(*curve_of(run.records, "val_loss"), strict=True)
    best = min(((loss, step) for step, loss in val_losses), default=None)
    return {
        "steps": steps,
        "training loss": show("loss", "{:.3f}"),
        "validation loss": show("val_loss", "{:.4f}"),
        "best validation loss": "{:.4f} at step {:,}".format(*best) if best else "–",
        "bits per byte": show("val_bits_per_byte", "{:.4f}"),
        "tokens": show("tokens", "{:,.0f}"),
        "training time": str(timedelta(seconds=round(run.seconds))),
        "tokens per second": show("tokens_per_second", "{:,.0f}", statistics.median),
        "MFU": show("mfu", "{:.1%}", statistics.median),
        "skipped updates": show("skipped", "{:,.0f}"),
        "restarts": str(len(run.restarts)),
    }


def tasks_section(runs: Sequence[Run]) -> str:
    """Each run's latest figures on lm-eval tasks."""
    names = dict.fromkeys(name for run in runs for name in run.task_figures)
    if not names:
        return ""
    rows = [[escape(name), *(show_figure(run, name) for run in runs)] for name in names]
    return (
        "<h2>Tasks</h2><p class='soft'>From lm-eval, at the last step evaluated; ± one "
        "standard error.</p>" + table(["", *run_names(runs)], rows, "numbers")
    )


def show_figure(run: Run, name: str) -> str:
    """The last value of a task figure as HTML, with its standard error, step and limit."""
    record = run.task_figures.get(name, {})
    if record.get(name) is None:
        return "–"
    task, _, metric = name.partition("/")
    metric, comma, filtered = metric.partition(",")
    stderr = record.get(f"{task}/{metric}_stderr{comma}{filtered}")
    text = f"{record[name]:.4f}"
    if stderr is not None:
        text += f" ± {stderr:.4f}"
    how = f"step {record['step']:,}"
    if record.get("limit"):
        how += f", the first {record['limit']:,} questions"
    return f"{text}<br><small>{how}</small>"


def samples_section(runs: Sequence[Run]) -> str:
    samples = ""
    for run in runs:
        if run.samples:
            samples += f'<h3>{escape(run.name)}</h3><div class="samples">'
            for step, text in run.samples:
                samples += f"<figure><figcaption>step {step:,}</figcaption>"
                samples += f'<pre tabindex="0">{escape(text)}</pre></figure>'
            samples += "</div>"
    if not samples:
        return ""
    return "<h2>Samples</h2><p class='soft'>Without a prompt, during training.</p>" + samples


def settings_section(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if not names:
        return ""
    section = "<h2>Settings</h2>"
    if len(runs) > 1:
        # Compare only the runs that have the setting.
        different = []
        for name in names:
            values = {repr(run.settings[name]) for run in runs if name in run.settings}
            if len(values) > 1:
                different.append(name)
        section += "<h3>Differences</h3>"
        section += settings_table(runs, different) if different else "<p>No setting differs.</p>"
    summary = "<summary>All settings</summary>"
    return section + f"<details>{summary}{settings_table(runs, names)}</details>"


def settings_table(runs: Sequence[Run], names: Iterable[str]) -> str:
    """A row per setting, a column per run; a dash means no value."""
    rows = []
    for name in names:
        values = [run.settings.get(name) for run in runs]
        cells = ["–" if value is None else escape(value) for value in values]
        rows.append([escape(name), *cells])
    return table(["setting", *run_names(runs)], rows)


# Charts


# Title: y-axis label, and metrics by their names in metrics.jsonl.
CHARTS = {
    "Loss": ("nats per token", ("loss", "val_loss")),
    "Validation, bits per byte": ("bits per byte", ("val_bits_per_byte",)),
    "Learning rate": ("learning rate", ("learning_rate",)),
    "Gradient norm": ("before clipping", ("grad_norm",)),
    "Speed": ("tokens per second", ("tokens_per_second",)),
    "Model FLOPs utilization": ("share of the measured peak", ("mfu",)),
    "Time per step": ("seconds", ("step_seconds_p50", "step_seconds_p99")),
}
NOISY = {"loss", "grad_norm", "tokens_per_second", "mfu"}  # drawn faint behind their running mean
DASHED = {"val_loss", "val_bits_per_byte", "step_seconds_p99"}
# The colors of the runs, and of everything else, in light mode; page.css names them and replaces
# them in dark mode.
COLORS = ("#2563b0", "#c2570c", "#2c8a4b", "#8a3fb3", "#b3892b", "#0f8a8a", "#c22a6b", "#5b6470")
INK, RED, GRID = "#1b1f24", "#c22a2a", "#dde1e6"
CSS_NAMES = {color: f"run-{i}" for i, color in enumerate(COLORS)}
CSS_NAMES |= {INK: "ink", RED: "bad", GRID: "line"}
LOG_SCALE_FROM = 40.0  # maximum / median above which the y axis is logarithmic


def draw_chart(title: str, runs: Sequence[Run]) -> Figure | None:
    """Draw all runs in one chart; `title` is a key of CHARTS or a task figure. None if no run has
    logged its metrics."""
    y_label, metrics = CHARTS.get(title, (title.partition("/")[2], (title,)))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, pad=10, color=INK)
    axes.set_xlabel("optimizer steps", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.margins(x=0.01, y=0.04)

    curves = [curve_of(run.records, metric) for run in runs for metric in metrics]
    values = [value for _, of_curve in curves for value in of_curve]
    if not values:
        return None
    # A few peaks would flatten everything else on a linear scale.
    if min(values) > 0 and max(values) > LOG_SCALE_FROM * statistics.median(values):
        axes.set_yscale("log")

    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        for metric in metrics:
            steps, values = curve_of(run.records, metric)
            style = {"color": color, "linewidth": 1.7}
            if metric in DASHED:
                style["linestyle"] = "--"
            if len(steps) < 20:
                style |= {"marker": "o", "markersize": 4}
            elif metric in NOISY:
                axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
                values = smoothed(values)
            axes.plot(steps, values, **style)
        for step in run.restarts:
            axes.axvline(step, color=color, linestyle=":", linewidth=1, gid=f"restart-{i}-{step}")

        # Triangles at the bottom wherever updates were skipped.
        steps, counts = curve_of(run.records, "skipped")
        growth = np.diff(counts, prepend=0)
        grown = [step for step, more in zip(steps, growth, strict=True) if more > 0]
        if grown:
            at_foot = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(grown, [0] * len(grown), "v", color=RED, gid=f"skipped-{i}", **at_foot)
    return figure


def to_svg(figure: Figure, title: str) -> str:
    """The figure as inline SVG, in the page's colors."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # drop these entries
    # Simplify dense curves to what is visible, keeping their peaks.
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "path.simplify_threshold": 0.5}
    with rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W+", "-", title).lower()  # keeps ids unique per chart
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for color, name in CSS_NAMES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
