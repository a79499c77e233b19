"""The report: how runs learned, as one HTML page.

Top to bottom: reading a run's folder, the page, its charts, and the command that repeats a run.
A run may still be training: a torn last line is skipped, and what is not written yet is missing.
"""

import io
import re
import shlex
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gpt import checkpoint
from gpt.config import TrainConfig, from_json, to_json
from gpt.errors import UserError, require
from gpt.presets import PRESETS
from gpt.reports.html import build_page, escape, table
from gpt.terminal import visible
from gpt.training.metrics import read_metrics
from gpt.training.resume import flatten

MAX_VALUE = 1e300  # larger ones are not plotted
MAX_SAMPLES = 12
MAX_SAMPLE_CHARACTERS = 2000
# Settings that the run derived itself, so that they are not flags of its command.
DERIVED = {"model.vocab_size", "model.compute_dtype", "model.cache_dtype"}


# Reading a run's folder


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    `records`: the lines of metrics.jsonl. `samples`: (step, text). `config` and `metadata` are
    those of the newest good checkpoint; without one, `config` is None and `note` says why.
    """

    name: str
    folder: Path
    records: list[dict[str, Any]]
    samples: list[tuple[int, str]]
    config: TrainConfig | None
    metadata: dict[str, Any]
    note: str
    last_written: datetime | None

    @property
    def imported(self) -> bool:
        """Whether the weights came from elsewhere and were never trained here."""
        return isinstance(self.metadata.get("source"), dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by dotted name. Of an imported model only the model's own are known."""
        settings = flatten(to_json(self.config)) if self.config else {}
        if self.imported:
            return {name: value for name, value in settings.items() if name.startswith("model.")}
        return settings

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def text_paths(self) -> list[str] | None:
        """The paths of its text as typed; empty for the default text; None if unknown."""
        data = self.metadata.get("data")
        paths = data.get("paths") if isinstance(data, dict) else None
        if isinstance(paths, list) and all(isinstance(path, str) for path in paths):
            return paths
        return None

    @property
    def training_records(self) -> list[dict[str, Any]]:
        """The lines about training steps; the others are about evaluations."""
        return [record for record in self.records if "seconds" in record]

    @property
    def process_changes(self) -> list[tuple[dict, dict]]:
        """For each restart, the last line of the old process and the first of the new one: the
        new one began at another step, or its seconds start again."""
        return [
            (before, after)
            for before, after in pairwise(self.training_records)
            if before.get("since_step") != after.get("since_step")
            or after["seconds"] < before["seconds"]
        ]

    @property
    def restarts(self) -> list[int]:
        """The step from which each later process continued."""
        steps = []
        for _, after in self.process_changes:
            since_step = after.get("since_step")
            steps.append(since_step if is_number(since_step) else after["step"])
        return steps

    @property
    def skipped_steps(self) -> list[int]:
        """The steps whose line counts more skipped updates than the line before."""
        steps, counts = self.series("skipped")
        counts_before = [0, *counts][: len(counts)]
        changes = zip(steps, counts_before, counts, strict=True)
        return [step for step, before, count in changes if count > before]

    @property
    def seconds(self) -> float:
        """Seconds of training, summed over processes."""
        last_lines = [before for before, _ in self.process_changes] + self.training_records[-1:]
        return sum(line["seconds"] for line in last_lines)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, without what is not a number."""
        records = [record for record in self.records if is_number(record.get(metric))]
        return [record["step"] for record in records], [record[metric] for record in records]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, named by their folders, or by their paths where two folders have one name.

    UserError if a folder does not hold a run.
    """
    short = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, short, strict=True):
        unique = name if short.count(name) == 1 else str(folder)
        printable = visible(unique).encode("utf-8", "replace").decode()
        runs.append(read_run(folder, printable))
    return runs


def read_run(folder: Path, name: str) -> Run:
    require(folder.is_dir(), f"no folder {folder}: expected a run's folder made by train.py")
    path = folder / "metrics.jsonl"
    records = [
        record
        for record in read_metrics(path)
        if is_number(record["step"]) and is_number(record.get("seconds", 0))
    ]
    require(
        bool(records or checkpoint.steps(folder)),
        f"{folder} holds neither metrics.jsonl nor a checkpoint: expected a run's folder",
    )
    last_written = datetime.fromtimestamp(path.stat().st_mtime) if path.exists() else None
    config, metadata, note = read_settings(folder)
    samples = read_samples(folder / "samples.jsonl")
    return Run(name, folder, records, samples, config, metadata, note, last_written)


def read_settings(folder: Path) -> tuple[TrainConfig | None, dict[str, Any], str]:
    """Config and metadata of the newest good checkpoint, and a note if something is missing."""
    if not checkpoint.steps(folder):
        return None, {}, "it has no checkpoint yet, and its settings are stored there"
    try:
        _, metadata, _ = checkpoint.latest_good(
            folder, lambda step: checkpoint.read_metadata(folder, step)
        )
        config = from_json(TrainConfig, metadata["train"])
    except UserError as error:
        return None, {}, f"its settings cannot be read: {error}"
    note = ""
    if isinstance(metadata.get("source"), dict):
        note = "it was imported and not trained here: only its model's settings are known"
    return config, metadata, note


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Up to MAX_SAMPLES of the texts that the model wrote, evenly spaced, with the last one."""
    texts = {
        record["step"]: record["text"][:MAX_SAMPLE_CHARACTERS]
        for record in read_metrics(path)
        if isinstance(record.get("text"), str)
    }
    samples = sorted(texts.items())
    if not samples:
        return []
    indices = np.linspace(0, len(samples) - 1, min(len(samples), MAX_SAMPLES)).round()
    return [samples[int(i)] for i in indices]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that can be plotted; true and false are not."""
    return type(value) in (int, float) and abs(value) <= MAX_VALUE


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which the runs differ, with one value per run (None: unknown)."""
    different = {}
    for name in flatten(to_json(TrainConfig())):
        values = {repr(run.settings[name]) for run in runs if name in run.settings}
        if len(values) > 1:
            different[name] = [run.settings.get(name) for run in runs]
    return different


# The page


def build_report(runs: Sequence[Run], python: str = "python") -> str:
    """The whole page. `python`: the interpreter as the user types it."""
    title = "Run report: " + ", ".join(run.name for run in runs)
    charts = "\n".join(
        f'<figure class="chart">{to_svg(figure, chart)}</figure>'
        for chart, figure in draw_charts(runs)
    )
    body = f"""<header><h1>{escape(title)}</h1></header>
<main>
{summary_section(runs)}
{curves_introduction(runs)}
<section class="charts" aria-label="Curves">
{charts or "<p>No step has been logged yet.</p>"}
</section>
{samples_section(runs)}
{settings_section(runs)}
{commands_section(runs, python)}
</main>"""
    return build_page(title, body)


def summary_section(runs: Sequence[Run]) -> str:
    """A table with one column per run."""
    columns = [summarize(run) for run in runs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    head = ["", *(escape(run.name) for run in runs)]
    notes = [
        f'<p class="soft">{escape(run.name)}: {escape(run.note)}.</p>' for run in runs if run.note
    ]
    return table(head, rows, "numbers") + "".join(notes)


def summarize(run: Run) -> dict[str, str]:
    """What a run has reached, and how fast, as HTML by label."""

    def last(metric: str, form: str) -> str:
        _, values = run.series(metric)
        return form.format(values[-1]) if values else "–"

    def median(metric: str, form: str) -> str:
        _, values = run.series(metric)
        return form.format(statistics.median(values)) if values else "–"

    val_losses = list(zip(*run.series("val_loss"), strict=True))
    best = "–"
    if val_losses:
        best_step, best_loss = min(val_losses, key=lambda point: point[1])
        best = f"{best_loss:.4f} at step {best_step:,}"
    return {
        "steps": progress(run),
        "training loss": last("loss", "{:.3f}"),
        "validation loss": last("val_loss", "{:.4f}"),
        "best validation loss": best,
        "bits per byte": last("val_bits_per_byte", "{:.4f}"),
        "tokens": last("tokens", "{:,.0f}"),
        "training time": str(timedelta(seconds=round(run.seconds))),
        "tokens per second": median("tokens_per_second", "{:,.0f}"),
        "MFU": median("mfu", "{:.1%}"),
        "skipped updates": last("skipped", "{:,.0f}"),
        "restarts": f"{len(run.restarts):,}",
    }


def progress(run: Run) -> str:
    """How far a run is and, if it is not complete, when it last wrote."""
    if run.imported:
        return "imported, not trained here"
    total = run.config.steps if run.config else None
    if total and run.last_step >= total:
        return f"{total:,}, complete"
    reached = f"{run.last_step:,}"
    if total:
        reached += f" of {total:,}"
    when = f"{run.last_written:%Y-%m-%d %H:%M}" if run.last_written else "never"
    return f"{reached}<br><small>last update {when}</small>"


def curves_introduction(runs: Sequence[Run]) -> str:
    text = (
        "Over optimizer steps. Solid lines are means over a twentieth of the run, with each logged "
        "step faint behind them. The dashed loss is that of the validation text."
    )
    if any(run.restarts for run in runs):
        text += " A dotted vertical line: the run was stopped and continued there."
    if any(run.skipped_steps for run in runs):
        text += (
            " A red triangle: an update was skipped because its loss or gradient was not finite."
        )
    return f'<h2>Curves</h2><p class="soft">{text}</p>'


def samples_section(runs: Sequence[Run]) -> str:
    """What the models wrote, without a prompt, during training."""
    parts = []
    for run in runs:
        if not run.samples:
            continue
        if len(runs) > 1:
            parts.append(f"<h3>{escape(run.name)}</h3>")
        figures = [
            f"<figure><figcaption>step {step:,}</figcaption>"
            f'<pre tabindex="0">{escape(text)}</pre></figure>'
            for step, text in run.samples
        ]
        parts.append(f'<div class="samples">{"".join(figures)}</div>')
    if not parts:
        return ""
    introduction = "<p class='soft'>Without a prompt, during training.</p>"
    return f"<h2>Samples</h2>{introduction}{''.join(parts)}"


def settings_section(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ, then all settings of each run."""
    if not any(run.config for run in runs):
        return ""
    parts = ["<h2>Settings</h2>"]
    if len(runs) > 1:
        rows = [
            [escape(name), *map(format_setting, values)]
            for name, values in sorted(differences(runs).items())
        ]
        head = ["setting", *(escape(run.name) for run in runs)]
        parts.append("<h3>Differences</h3>")
        parts.append(table(head, rows) if rows else "<p>No setting differs.</p>")
    for run in runs:
        if run.settings:
            rows = [[escape(name), format_setting(v)] for name, v in run.settings.items()]
            summary = f"<summary>All settings of {escape(run.name)}</summary>"
            parts.append(f"<details>{summary}{table(['setting', 'value'], rows)}</details>")
    return "".join(parts)


def format_setting(value: Any) -> str:
    """A value as people type it."""
    if value is None:
        return "–"
    return escape(f"{value:g}" if isinstance(value, float) else value)


def commands_section(runs: Sequence[Run], python: str = "python") -> str:
    """The command that repeats each run, and what must be the same for the same result."""
    parts = []
    for run in runs:
        if not (run.config and run.last_step):
            continue
        data = run.metadata.get("data")
        fingerprint = str(data.get("fingerprint")) if isinstance(data, dict) else "unknown"
        if run.text_paths is None:
            condition = "Add <code>--data</code> with its text, unless that was the default"
        elif run.text_paths:
            condition = "Run it in the folder where the run was started, with the same text"
        else:
            condition = "Its text is the standard library of the Python that trained it"
        parts.append(
            f"<h3>{escape(run.name)}</h3>"
            f'<pre tabindex="0">{escape(command_to_repeat(run, python))}</pre>'
            f'<p class="soft">{condition}: text and tokenizer together have the fingerprint '
            f"<code>{escape(fingerprint[:12])}</code>.</p>"
        )
    return "<h2>Command to repeat the run</h2>" + "".join(parts) if parts else ""


# Charts


@dataclass(frozen=True)
class Chart:
    """One picture. `metrics`: names in metrics.jsonl, with their labels in the legend."""

    name: str
    title: str
    y_label: str
    metrics: dict[str, str]


CHARTS = (
    Chart("loss", "Loss", "nats per token", {"loss": "training", "val_loss": "validation"}),
    Chart("bits", "Validation, bits per byte", "bits per byte", {"val_bits_per_byte": ""}),
    Chart("learning_rate", "Learning rate", "learning rate", {"learning_rate": ""}),
    Chart("grad_norm", "Gradient norm", "before clipping", {"grad_norm": ""}),
    Chart("speed", "Speed", "tokens per second", {"tokens_per_second": ""}),
    Chart("mfu", "Model FLOPs utilization", "share of the measured peak", {"mfu": ""}),
    Chart(
        "step_seconds",
        "Time per step",
        "seconds",
        {"step_seconds_p50": "median", "step_seconds_p99": "99th percentile"},
    ),
)
NOISY = {"loss", "grad_norm", "tokens_per_second", "mfu"}  # drawn faint, their mean in front
DASHED = {"val_loss", "val_bits_per_byte", "step_seconds_p99"}
COLORS = ("#2563b0", "#c2570c", "#2c8a4b", "#8a3fb3", "#b3892b", "#0f8a8a", "#c22a6b", "#5b6470")
INK, RED, GRID = "#1b1f24", "#c22a2a", "#dde1e6"
CJK_FONTS = ("Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans CJK JP")
MAX_MARKERS = 200
LOG_SCALE_FROM = 40.0  # largest value over median, from which the y axis is logarithmic


def draw_charts(runs: Sequence[Run]) -> list[tuple[Chart, Figure]]:
    """The charts for which some run has numbers."""
    figures = [(chart, draw_chart(chart, runs)) for chart in CHARTS]
    return [(chart, figure) for chart, figure in figures if figure]


def draw_chart(chart: Chart, runs: Sequence[Run]) -> Figure | None:
    """All runs in one picture; None if no run has logged these metrics."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines, labels, all_values = [], [], []
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        for metric, label in chart.metrics.items():
            steps, values = run.series(metric)
            if not steps:
                continue
            style = {"color": color, "linewidth": 1.7}
            if metric in DASHED:
                style["linestyle"] = "--"
            if len(steps) == 1 or (metric in DASHED and len(steps) <= 100):
                style |= {"marker": "o", "markersize": 4}
            if metric in NOISY and len(steps) >= 20:
                axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
                lines += axes.plot(steps, running_mean(values), **style)
            else:
                lines += axes.plot(steps, values, **style)
            labels.append(f"{run.name} {label}".strip())
            all_values += values
        mark_events(axes, run, color)
    if not lines:
        return None
    style_axes(axes, chart, all_values)

    # A run's name is shown as it is: `$` begins no formula and `_` hides nothing.
    legend = axes.legend(lines, ["line"] * len(lines), frameon=False, fontsize=9, labelcolor=INK)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
    return figure


def style_axes(axes, chart: Chart, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    axes.margins(x=0.01, y=0.04)
    if needs_log_scale(values):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
    elif low >= 0:
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    axes.set_title(chart.title, loc="left", fontsize=11, pad=10, color=INK)
    axes.set_xlabel("optimizer steps", color=INK)
    axes.set_ylabel(chart.y_label, color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def mark_events(axes, run: Run, color: str) -> None:
    """Dotted lines where a run was restarted, triangles at the foot where updates were skipped."""
    for step in thin(run.restarts):
        axes.axvline(step, color=color, linestyle=":", linewidth=1, gid=f"restart-{step}")
    steps = thin(run.skipped_steps)
    if steps:
        at_foot = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(steps, [0] * len(steps), "v", color=RED, gid=f"skipped-{steps[0]}", **at_foot)


def thin(steps: list[int]) -> list[int]:
    """At most MAX_MARKERS of them."""
    return steps[:: 1 + len(steps) // MAX_MARKERS]


def running_mean(values: Sequence[float]) -> np.ndarray:
    """The mean over a twentieth of `values` around each; the window narrows towards both ends, so
    that the curve does not lag. Geometric where the scale is logarithmic, since one peak would
    otherwise become a plateau."""
    values = np.asarray(values, float)
    if needs_log_scale(values):
        return np.exp(_running_mean(np.log(values)))
    return _running_mean(values)


def _running_mean(values: np.ndarray) -> np.ndarray:
    n = len(values)
    i = np.arange(n)
    reach = np.minimum(np.minimum(i, n - 1 - i), n // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)


def needs_log_scale(values: Sequence[float]) -> bool:
    """Whether a few peaks would flatten everything else on a linear scale."""
    return bool(np.min(values) > 0 and np.max(values) > LOG_SCALE_FROM * np.median(values))


def to_svg(figure: Figure, chart: Chart) -> str:
    """The figure as SVG to be placed in a page, in the page's colors."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # nothing but the picture
    # Curves of many points are simplified to what can be seen, peaks included.
    style = {"svg.fonttype": "none", "svg.hashsalt": chart.name, "path.simplify_threshold": 0.5}
    save_figure(figure, buffer, style, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{chart.name}-", svg)  # ids differ by chart
    for color in (INK, GRID, RED):
        name = {INK: "ink", GRID: "line", RED: "bad"}[color]
        svg = svg.replace(color, f"var(--{name})")
    for i, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--run-{i})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(chart.title)}" ', 1)


def save_pngs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Each chart as a PNG in `folder`, which is made if need be; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart, figure in draw_charts(runs):
        paths.append(folder / f"{chart.name}.png")
        save_figure(figure, paths[-1])
    return paths


def save_figure(figure: Figure, target: Path | io.StringIO, style: Any = None, **options) -> None:
    """Save with fonts that cover Chinese and Japanese, as far as this machine has them."""
    from matplotlib.font_manager import get_font_names

    installed = get_font_names()
    fonts = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    for text in figure.findobj(matplotlib.text.Text):
        text.set_fontfamily(fonts)
    with matplotlib.rc_context(style or {}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # a letter that no font has becomes a box
        figure.savefig(target, **options)


# The command that repeats a run


def command_to_repeat(run: Run, python: str = "python") -> str:
    """The command that trains `run` again into a folder beside it: the preset that needs the
    fewest flags, then those flags."""
    init_from = run.metadata.get("init_from")
    if not isinstance(init_from, str):
        init_from = None

    # --init-from takes the model from the other run, not from the preset: then every setting of
    # the model is a flag.
    flags_by_preset = {
        name: flags_from(preset, run.config, every_model_setting=init_from is not None)
        for name, preset in PRESETS.items()
    }
    preset = min(flags_by_preset, key=lambda name: len(flags_by_preset[name]))

    words = [python, "train.py", preset, *flags_by_preset[preset]]
    if run.text_paths:
        words += ["--data", *run.text_paths]
    if init_from is not None:
        words += ["--init-from", init_from]
    # Nothing can be appended to "." or "..".
    folder = run.folder.resolve() if run.folder.name in ("", "..") else run.folder
    return shlex.join([*words, "--out", f"{folder}-again"])


def flags_from(preset: TrainConfig, config: TrainConfig, every_model_setting: bool) -> list[str]:
    """The flags that turn `preset` into `config`."""
    derived = set(DERIVED)
    if config.seq_len:
        derived.add("model.context_length")
    preset_settings = flatten(to_json(preset))
    words = []
    for name, value in flatten(to_json(config)).items():
        is_wanted = value != preset_settings[name]
        if every_model_setting and name.startswith("model."):
            is_wanted = True
        if is_wanted and name not in derived:
            words += format_flag(name, value)
    return words


def format_flag(name: str, value: Any) -> list[str]:
    """A setting as people type it: `--model.d-model 64`, `--model.no-bias`."""
    *groups, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*groups, last if value else f"no-{last}"])]
    return ["--" + ".".join([*groups, last]), str(value)]
