"""A panel of curves as HTML with inline SVG, or as a PNG. Readable at any width.

The SVG is stretched to its frame, the strokes are not; labels are text beside it. So a picture
needs no script: the script only reads values off.
"""

import warnings
from pathlib import Path

import numpy as np

from gpt.reports.curves import MOST_MARKS, Curve, Panel, tell, ticks
from gpt.reports.html import escape

SIZE = 10_000  # units of the viewBox on either side: whole numbers are fine enough
COLOURS = ("#2563b0", "#c2570c", "#2c8a4b", "#8a3fb3", "#b3892b", "#0f8a8a", "#c22a6b", "#5b6470")
WIDE_FONTS = ("Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans CJK JP")


def colour(run: int) -> str:
    """The style variable of a run's colour."""
    return f"var(--run-{run % len(COLOURS)})"


def draw(panel: Panel, first: bool = False) -> str:
    """The panel as a figure; the `first` one is wide."""
    lines, labels = axis_y(panel)
    curves = "".join(path(panel, curve) for curve in panel.curves)
    scale = ", logarithmic scale" if panel.log else ""
    told = f"{panel.title}, {panel.unit}{scale}"
    return f"""<figure class="chart{" first" if first else ""}">
<p class="title">{escape(panel.title)} <small>{escape(panel.unit + scale)}</small></p>
<div class="frame" tabindex="0" role="img" data-panel="{panel.name}"
 aria-label="{escape(told)}; arrow keys read values off">
<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" aria-hidden="true">
{lines}{marks(panel)}{curves}<path class="cross" d=""/></svg>
{labels_x(panel)}{labels}</div>
<p class="tip" aria-live="polite"></p>
</figure>"""


def whole(shares: np.ndarray) -> np.ndarray:
    """Shares of a side as whole units of the viewBox."""
    return np.rint(np.asarray(shares) * SIZE).astype(int)


def path(panel: Panel, curve: Curve) -> str:
    """One curve, and a dot at each point where there are few."""
    x, y = whole(panel.across(curve.steps)), SIZE - whole(panel.up(curve.values))
    points = [f"{a} {b}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    about = f'data-run="{curve.run}" style="stroke:{colour(curve.run)}"'
    drawn = f'<path class="curve {curve.kind}" {about} d="M{"L".join(points)}"/>\n'
    if (curve.kind == "held" and len(points) <= 100) or len(points) == 1:
        dots = "".join(f"M{point}h0" for point in points)
        drawn += f'<path class="dot" {about} d="{dots}"/>\n'
    return drawn


def marks(panel: Panel) -> str:
    """Restarts as dotted lines, skipped updates as short strokes at the foot."""
    drawn = ""
    for kind, events, height in (("restart", panel.restarts, 0), ("skip", panel.skips, 9300)):
        for run in sorted({run for run, _ in events}):
            steps = [step for r, step in events if r == run]
            at = whole(panel.across(steps[:: 1 + len(steps) // MOST_MARKS]))
            d = "".join(f"M{x} {SIZE}V{height}" for x in at)
            about = f'data-run="{run}"'
            if kind == "restart":  # a skip is red, whoever's it is
                about += f' style="stroke:{colour(run)}"'
            drawn += f'<path class="{kind}" {about} d="{d}"/>\n'
    return drawn


def labels_x(panel: Panel) -> str:
    """The steps below; they have no lines of grid."""
    return "".join(
        f'<span class="x" style="left:{100 * tick / panel.last:.2f}%">{tick:,.0f}</span>'
        for tick in ticks(0, panel.last, log=False, whole=True)
    )


def axis_y(panel: Panel) -> tuple[str, str]:
    """Grid lines over the values, and their labels."""
    at = ticks(*panel.reach, panel.log)
    shares = panel.up(np.array(at)).tolist()
    lines = "".join(f"M0 {SIZE - round(share * SIZE)}H{SIZE}" for share in shares)
    labels = [
        f'<span class="y" style="bottom:{100 * share:.2f}%">{tell(tick)}</span>'
        for tick, share in zip(at, shares, strict=True)
    ]
    return f'<path class="grid" d="{lines}"/>\n', "".join(labels)


def readable(panel: Panel, names: list[str]) -> dict:
    """What the script reads values off: the curves in front, with five digits."""
    curves = [
        {
            "run": curve.run,
            "label": f"{names[curve.run]} {curve.label}".strip(),
            "x": np.asarray(curve.steps).tolist(),
            "y": [float(f"{value:.5g}") for value in curve.values],
        }
        for curve in panel.curves
        if curve.kind != "raw"
    ]
    return {"last": panel.last, "curves": curves}


def save_picture(panel: Panel, names: list[str], folder: Path) -> Path:
    """The panel as a PNG in `folder`; its path."""
    import matplotlib  # half a second that only this needs
    from matplotlib.figure import Figure

    place = folder / f"{panel.name}.png"
    with matplotlib.rc_context({"font.family": fonts()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # a letter that no font here has is a box
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        plot(panel, names, figure.subplots())
        figure.savefig(place)
    return place


def fonts() -> list[str]:
    """Those of a PNG's text: the first that has a letter gives it. Only what is on this machine,
    since matplotlib warns of any other."""
    from matplotlib.font_manager import get_font_names

    there = get_font_names()
    return ["DejaVu Sans", *(name for name in WIDE_FONTS if name in there)]


def plot(panel: Panel, names: list[str], axes) -> None:
    """The panel on matplotlib's `axes`."""
    looks = {"raw": {"alpha": 0.3, "linewidth": 0.8}, "held": {"linestyle": "--"}, "curve": {}}
    for curve in panel.curves:
        look = {"linewidth": 1.7, "color": COLOURS[curve.run % len(COLOURS)]} | looks[curve.kind]
        label = None if curve.kind == "raw" else say(names[curve.run], curve.label)
        dots = {"marker": "o", "markersize": 4} if len(curve.steps) <= 100 else {}
        dots = dots if curve.kind == "held" or len(curve.steps) == 1 else {}
        axes.plot(curve.steps, curve.values, label=label, **look, **dots)
    for _, step in panel.restarts:
        axes.axvline(step, color="#5b6470", linestyle=":", linewidth=1)
    axes.plot(*skip_points(panel), "v", color="#c22a2a", clip_on=False)
    axes.set(xlabel="optimizer steps", ylabel=panel.unit, yscale="log" if panel.log else "linear")
    axes.set_ylim(panel.reach)
    axes.set_title(panel.title.replace("$", r"\$"), loc="left", fontsize=11, pad=10)
    axes.xaxis.get_major_locator().set_params(integer=True)  # a short run has few steps
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.margins(x=0.01)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def say(name: str, label: str) -> str:
    """A curve in the legend of a PNG. As it is: no formula, and shown though it may begin with an
    underscore; bytes of a folder's name that are no text are `?`."""
    text = f" {name} {label}".encode("utf-8", "replace").decode()
    return text.replace("$", r"\$")


def skip_points(panel: Panel) -> tuple[list[int], list[float]]:
    """Where a PNG marks skipped updates: at the foot."""
    steps = [step for _, step in panel.skips]
    return steps, [panel.reach[0]] * len(steps)
