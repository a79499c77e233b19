"""Draws the pictures of how-it-works.md from a trained run: real weights, a real forward pass.

python docs/pictures.py runs/tiny --prompt "for line in lines:" --out docs
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from gpt import flops, load
from gpt.reports import tour_recorder
from gpt.reports.spelling import spell_all
from gpt.sampling.settings import Settings

BLUE, ORANGE, GREY = "#2563b0", "#c2570c", "#8b939c"


@dataclass(frozen=True)
class Command:
    """What to draw from."""

    run: tyro.conf.Positional[Path]
    """A run's folder."""
    prompt: str = "for line in lines:\n    if line"
    """Text to take through the model."""
    out: Path = Path("docs")
    """Folder of the pictures."""


def figure(width: float, height: float):
    """A figure whose text is text, in a style of its own."""
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "path", "font.size": 9, "svg.hashsalt": "gpt"}
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(drawn, path: Path) -> None:
    """As SVG without a date, so that the same run draws the same file; no label is cut off."""
    drawn.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    print(path)


def bare(axes) -> None:
    """No frame, no ticks."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_regimes(journey: tour_recorder.Journey, words: list[str], path: Path) -> None:
    """The cache, slot by slot, over the calls of the model: a column read, a cell written."""
    T, P = len(journey.prompt_ids), len(journey.read_ids)
    drawn = figure(9, 0.36 * len(journey.readings) + 1.5)
    axes = drawn.subplots()
    for row, reading in enumerate(journey.readings):
        for slot in range(P):
            colour = "#b8cbe6" if slot < reading.first else "#f1f2f4"
            colour = ORANGE if slot in reading.written else colour
            axes.add_patch(matplotlib.patches.Rectangle((slot, row), 0.92, 0.86, color=colour))
        n, first = len(reading.tokens), reading.first
        moved = flops.decode_bytes if first else flops.prefill_bytes
        size = moved(journey.config, 1, first or n)
        work = flops.forward_flops(journey.config, n, first, 1)
        name = f"decode step {row}" if row else "prefill"
        axes.text(-0.3, row + 0.45, f"{name}, {n} token{'s' * (n > 1)}", ha="right", va="center")
        axes.text(P + 0.3, row + 0.45, f"{work / size:.1f} operations a byte", va="center")
    for slot, word in enumerate(words[:P]):
        colour = "black" if slot < T else ORANGE
        axes.text(slot + 0.46, -0.2, word, rotation=60, ha="left", va="bottom", color=colour)
    axes.set(xlim=(-4.5, P + 6), ylim=(len(journey.readings), -2.2))
    bare(axes)
    axes.text(0, len(journey.readings) + 0.25, "orange: written   blue: read back", color=GREY)
    save(drawn, path)


def draw_scores(journey: tour_recorder.Journey, words: list[str], path: Path) -> None:
    """One head over the prompt: scores, divided, masked, as shares."""
    T = len(journey.prompt_ids)
    layer, head = pointed(journey)
    scores = journey.map("scores")[layer, head, :T, :T]
    scaled = scores / np.sqrt(journey.config.head_width)
    masked = np.where(np.tril(np.ones((T, T), bool)), scaled, np.nan)
    weights = journey.map("weights")[layer, head, :T, :T]
    steps = [("q·k", scores), ("q·k / √H", scaled), ("masked", masked), ("softmax", weights)]
    drawn = figure(11, 3.4)
    for axes, (name, values) in zip(drawn.subplots(1, 4), steps, strict=True):
        top = np.nanmax(np.abs(values))
        look = (
            {"cmap": "Blues", "vmin": 0} if name == "softmax" else {"cmap": "RdBu_r", "vmin": -top}
        )
        axes.imshow(values, vmax=top, **look)
        axes.set_title(f"{name}   (to ±{top:.1f})" if name != "softmax" else name, fontsize=10)
        axes.set_xticks(range(T), words[:T], rotation=90, fontsize=8)
        axes.set_yticks(range(T), words[:T] if name == "q·k" else [], fontsize=8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    drawn.suptitle(f"layer {layer + 1}, head {head + 1}: rows ask, columns answer", fontsize=10)
    save(drawn, path)


def pointed(journey: tour_recorder.Journey) -> tuple[int, int]:
    """The layer and head that look hardest at one earlier token, over all rows of the prompt."""
    T = len(journey.prompt_ids)
    earlier = np.tril(np.ones((T, T)), -1)
    earlier[:, 0] = 0  # where heads rest that have nothing to look for
    sharp = (journey.map("weights")[..., :T, :T] * earlier).max(-1).mean(-1)
    return tuple(int(i) for i in np.unravel_index(sharp.argmax(), sharp.shape))


def draw_heads(journey: tour_recorder.Journey, path: Path) -> None:
    """Every head's map."""
    weights = journey.map("weights")
    L, N = weights.shape[:2]
    drawn = figure(1.6 * N + 0.6, 1.6 * L)
    for i, axes in enumerate(np.atleast_1d(drawn.subplots(L, N)).flat):
        axes.imshow(np.sqrt(weights[i // N, i % N]), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {i // N + 1}, head {i % N + 1}", fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#dddddd")
    save(drawn, path)


def draw_sampler(drawing: tour_recorder.Drawing, decode_bytes, path: Path) -> None:
    """The likeliest tokens after prefill, as each setting left them."""
    stages = drawing.stages
    top = np.argsort(-stages["the model"], kind="stable")[:10]
    words = [spell_all([token], decode_bytes)[0].text for token in top.tolist()]
    drawn = figure(9, 2.8)
    for axes, (name, probs) in zip(
        drawn.subplots(1, len(stages), sharex=True), stages.items(), strict=True
    ):
        axes.barh(
            range(10), probs[top], color=[ORANGE if t == drawing.token else BLUE for t in top]
        )
        axes.set_title(f"{name}: {np.count_nonzero(probs):,} left", fontsize=10)
        axes.set_yticks(range(10), words if name == "the model" else [])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:.0%}")
    save(drawn, path)


def main() -> None:
    """Take the tour once, draw each picture of it."""
    command = tyro.cli(Command, description=__doc__)
    model = load(command.run)
    settings = Settings(max_new_tokens=6, temperature=0.8, top_k=50, top_p=0.9)
    journey = tour_recorder.take_tour(model, command.prompt, settings)
    decode_bytes = model.tokenizer.decode_bytes
    ids = [*journey.prompt_ids, *(drawing.token for drawing in journey.drawings)]
    words = [spelled.text for spelled in spell_all(ids, decode_bytes)]
    draw_regimes(journey, words, command.out / "regimes.svg")
    draw_scores(journey, words, command.out / "attention.svg")
    draw_heads(journey, command.out / "heads.svg")
    draw_sampler(journey.drawings[0], decode_bytes, command.out / "sampler.svg")


if __name__ == "__main__":
    main()
