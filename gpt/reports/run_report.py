"""The report of runs: how they learned, what they wrote, with what settings. Numbers to a page."""

import statistics
from collections.abc import Sequence
from typing import Any

from gpt.reports import chart
from gpt.reports.curves import Curve, Panel, evenly, smooth, thin
from gpt.reports.html import assemble, escape, table
from gpt.reports.runs import Run, command_of, differences
from gpt.training.metrics import clock

# A picture each: its file's name, title, unit, and the metrics in it with what they are called.
PANELS = (
    ("loss", "Loss", "nats a token", {"loss": "training", "val_loss": "validation"}),
    ("bits", "Validation, bits a byte", "bits", {"val_bits_per_byte": ""}),
    ("learning_rate", "Learning rate", "by the schedule", {"learning_rate": ""}),
    ("grad_norm", "Gradient norm", "before clipping", {"grad_norm": ""}),
    ("speed", "Speed", "tokens a second", {"tokens_per_second": ""}),
    ("mfu", "Model FLOPs utilisation", "share of the measured peak", {"mfu": ""}),
    (
        "step_seconds",
        "Time of a step",
        "seconds: the median; dashed, what 99 in 100 keep within",
        {"step_seconds_p50": "median", "step_seconds_p99": "99 in 100 keep within"},
    ),
)
NOISY = {"loss", "grad_norm", "tokens_per_second", "mfu"}  # their mean is drawn in front


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The pictures that the runs have numbers for."""
    skips = [(i, step) for i, run in enumerate(runs) for step in run.skipped]
    restarts = [(i, step) for i, run in enumerate(runs) for step in run.restarts]
    found = []
    for name, title, unit, metrics in PANELS:
        curves = [
            curve
            for i, run in enumerate(runs)
            for metric, label in metrics.items()
            for curve in curves_of(run, i, metric, label)
        ]
        if curves:
            found.append(Panel(name, title, unit, curves, skips, restarts))
    return found


def curves_of(run: Run, i: int, metric: str, label: str) -> list[Curve]:
    """A metric of a run: as it is, or faint behind its mean."""
    steps, values = run.series(metric)
    if not steps:
        return []
    if metric not in NOISY or len(steps) < 20:
        dashed = metric.startswith("val_") or metric.endswith("p99")
        return [Curve(i, label, *thin(steps, values), kind="held" if dashed else "curve")]
    raw = Curve(i, label, *thin(steps, values), kind="raw")
    return [raw, Curve(i, label, *evenly(steps, smooth(values)))]


def build(runs: Sequence[Run], python: str = "python") -> str:
    """The whole page. `python`: as one types it."""
    names, pictures = [run.name for run in runs], panels(runs)
    title = "Run report: " + ", ".join(names)
    drawn = "\n".join(chart.draw(panel, i == 0) for i, panel in enumerate(pictures))
    body = f"""<header><h1>{escape(title)}</h1></header>
<main>
{summary(runs)}
{legend(runs, pictures)}
<section class="charts" aria-label="Curves">
{drawn or "<p>No step has been logged yet.</p>"}
</section>
{samples(runs)}
{settings(runs)}
{commands(runs, python)}
</main>"""
    data = {panel.name: chart.readable(panel, names) for panel in pictures}
    return assemble(title, body, data, "report.js")


def summary(runs: Sequence[Run]) -> str:
    """A column of numbers for each run."""
    names = ["steps", "training loss", "validation loss", "the best of them", "bits a byte"]
    names += ["tokens", "training time", "tokens a second", "MFU", "skipped updates", "restarts"]
    columns = [[progress(run), *map(escape, numbers(run))] for run in runs]
    head = ["", *(escape(run.name) for run in runs)]
    notes = "".join(
        f'<p class="soft">{escape(run.name)}: {escape(run.note)}.</p>' for run in runs if run.note
    )
    return table(head, zip(names, *columns, strict=True), "numbers") + notes


def progress(run: Run) -> str:
    """How far a run is, and when it was last heard of if that is not the end."""
    if run.imported:
        return "imported, not trained here"
    whole = run.config.steps if run.config else None
    if whole and run.last_step >= whole:
        return f"{whole:,}, complete"
    told = f"{run.last_step:,}" + (f" of {whole:,}" if whole else "")
    when = run.written.strftime("%Y-%m-%d %H:%M") if run.written else "never"
    return f"{told}<br><small>last heard of {when}</small>"


def numbers(run: Run) -> list[str]:
    """What a run has reached, and how fast."""
    held = list(zip(*run.series("val_loss"), strict=True))
    best = min(held, key=lambda point: point[1], default=None)
    speeds, shares = run.series("tokens_per_second")[1], run.series("mfu")[1]
    skipped = run.series("skipped")[1]
    return [
        last(run, "loss", "{:.3f}"),
        last(run, "val_loss", "{:.4f}"),
        f"{best[1]:.4f} at {best[0]:,}" if best else "–",
        last(run, "val_bits_per_byte", "{:.4f}"),
        last(run, "tokens", "{:,.0f}"),
        clock(run.seconds),
        f"{statistics.median(speeds):,.0f}" if speeds else "–",
        f"{statistics.median(shares):.1%}" if shares else "–",
        f"{skipped[-1]:,.0f}" if skipped else "–",
        f"{len(run.restarts):,}",
    ]


def last(run: Run, metric: str, form: str) -> str:
    """The last value of a metric, or a dash."""
    values = run.series(metric)[1]
    return form.format(values[-1]) if values else "–"


def legend(runs: Sequence[Run], pictures: Sequence[Panel]) -> str:
    """Which colour is whose, to be switched off and on; what the marks mean."""
    labels = "".join(
        f'<label><input type="checkbox" checked data-run="{i}">'
        f'<span class="swatch" style="background:{chart.colour(i)}"></span>'
        f"{escape(run.name)}</label>"
        for i, run in enumerate(runs)
    )
    said = "Over optimizer steps. Solid: training, smoothed over a twentieth of the run, with each "
    said += "logged step faint behind it. Dashed losses: held-out text."
    if any(panel.restarts for panel in pictures):
        said += " A dotted upright line: the run was stopped and continued there."
    if any(panel.skips for panel in pictures):
        said += " A red stroke at the foot: an update was skipped, its loss or gradient not finite."
    shown = f'<div class="legend">{labels}</div>' if len(runs) > 1 else ""
    return f'<h2>Curves</h2><p class="soft">{said}</p>{shown}'


def samples(runs: Sequence[Run]) -> str:
    """What the models wrote from nothing as they learned."""
    parts = []
    for run in runs:
        if run.samples:
            shown = "".join(
                f"<figure><figcaption>step {step:,}</figcaption>"
                f'<pre tabindex="0">{escape(text)}</pre></figure>'
                for step, text in run.samples
            )
            title = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
            parts.append(f'{title}<div class="samples">{shown}</div>')
    if not parts:
        return ""
    return "<h2>What it wrote</h2><p class='soft'>From nothing, as it learned.</p>" + "".join(parts)


def spell(value: Any) -> str:
    """A setting's value as people type it."""
    return "–" if value is None else escape(f"{value:g}" if isinstance(value, float) else value)


def settings(runs: Sequence[Run]) -> str:
    """In what the runs differ, then all settings of each."""
    apart = differences(runs)
    rows = [[escape(name), *map(spell, values)] for name, values in sorted(apart.items())]
    head = ["setting", *(escape(run.name) for run in runs)]
    shown = "<h2>Settings</h2>"
    if len(runs) > 1:
        told = table(head, rows) if rows else "<p>No setting differs.</p>"
        shown += f"<h3>In which the runs differ</h3>{told}"
    for run in runs:
        if run.settings:
            pairs = [[escape(name), spell(value)] for name, value in run.settings.items()]
            every = table(["setting", "value"], pairs)
            shown += (
                f"<details><summary>All settings of {escape(run.name)}</summary>{every}</details>"
            )
    return shown if any(run.config for run in runs) else ""


def commands(runs: Sequence[Run], python: str = "python") -> str:
    """How each run is made again."""
    parts = [
        f'<h3>{escape(run.name)}</h3><pre tabindex="0">{escape(command_of(run, python))}</pre>'
        f'<p class="soft">{text_of(run)}</p>'
        for run in runs
        if run.config and run.last_step
    ]
    return "<h2>The command to make it again</h2>" + "".join(parts) if parts else ""


def text_of(run: Run) -> str:
    """What the command says of its text, or leaves open."""
    code = f"<code>{escape(run.fingerprint[:12])}</code>"
    mark = f"text and tokenizer together have the fingerprint {code}"
    if run.paths is None:
        return f"Name its text with <code>--data</code>, unless it was the default: {mark}."
    if not run.paths:
        return f"Its text is Python's standard library, of that Python which trained it: {mark}."
    return f"In the folder that it was typed in, with the same text: {mark}."
