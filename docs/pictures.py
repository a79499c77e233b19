"""Draws the pictures of how-it-works.md from the forward pass of a trained run.

python docs/pictures.py runs/tiny --prompt "for line in lines:" --out docs
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from gpt import flops, load
from gpt.reports import tour_recorder
from gpt.reports.tour import display_tokens
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
    """A figure in the style of these pictures."""
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "path", "font.size": 9, "svg.hashsalt": "gpt"}
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(picture, path: Path) -> None:
    """As SVG without a date, so that the same run draws the same file; no label is cut off."""
    picture.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    print(path)


def bare(axes) -> None:
    """No frame, no ticks."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_regimes(record: tour_recorder.TourRecord, words: list[str], path: Path) -> None:
    """The cache, slot by slot, over the calls of the model: a column read, a cell written."""
    T, P = len(record.prompt_ids), len(record.read_ids)
    picture = figure(9, 0.36 * len(record.calls) + 1.5)
    axes = picture.subplots()
    for row, call in enumerate(record.calls):
        n, first = len(call.tokens), call.first_position
        colours = ["#b8cbe6"] * first + [ORANGE] * n + ["#f1f2f4"] * (P - first - n)
        for slot, colour in enumerate(colours):
            axes.add_patch(matplotlib.patches.Rectangle((slot, row), 0.92, 0.86, color=colour))
        moved = flops.decode_bytes if first else flops.prefill_bytes
        size = moved(record.config, 1, first or n)
        work = flops.forward_flops(record.config, n, first, 1)
        name = f"decode step {row}" if row else "prefill"
        axes.text(-0.3, row + 0.45, f"{name}, {n} token{'s' * (n > 1)}", ha="right", va="center")
        axes.text(P + 0.3, row + 0.45, f"{work / size:.1f} operations per byte", va="center")
    for slot, word in enumerate(words[:P]):
        colour = "black" if slot < T else ORANGE
        axes.text(slot + 0.46, -0.2, word, rotation=60, ha="left", va="bottom", color=colour)
    axes.set(xlim=(-4.5, P + 6), ylim=(len(record.calls), -2.2))
    bare(axes)
    axes.text(0, len(record.calls) + 0.25, "orange: written   blue: read", color=GREY)
    save(picture, path)


def draw_scores(record: tour_recorder.TourRecord, words: list[str], path: Path) -> None:
    """The attention of one head over the prompt: scores, scaled, masked, softmax."""
    T = len(record.prompt_ids)
    layer, head = pointed(record)
    scores = record.attention_map("scores")[layer, head, :T, :T]
    scaled = scores / np.sqrt(record.config.head_width)
    masked = np.where(np.tril(np.ones((T, T), bool)), scaled, np.nan)
    weights = record.attention_map("weights")[layer, head, :T, :T]
    steps = [("q·k", scores), ("q·k / √H", scaled), ("masked", masked), ("softmax", weights)]
    picture = figure(11, 3.4)
    for axes, (name, values) in zip(picture.subplots(1, 4), steps, strict=True):
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
    picture.suptitle(
        f"layer {layer + 1}, head {head + 1}: rows are queries, columns are keys", fontsize=10
    )
    save(picture, path)


def pointed(record: tour_recorder.TourRecord) -> tuple[int, int]:
    """The layer and head with the largest weights on single earlier tokens, on average."""
    T = len(record.prompt_ids)
    earlier = np.tril(np.ones((T, T)), -1)
    earlier[:, 0] = 0  # heads that look for nothing put their weight there
    sharp = (record.attention_map("weights")[..., :T, :T] * earlier).max(-1).mean(-1)
    return tuple(int(i) for i in np.unravel_index(sharp.argmax(), sharp.shape))


def draw_heads(record: tour_recorder.TourRecord, path: Path) -> None:
    """Every head's map."""
    weights = record.attention_map("weights")
    L, N = weights.shape[:2]
    picture = figure(1.6 * N + 0.6, 1.6 * L)
    for i, axes in enumerate(np.atleast_1d(picture.subplots(L, N)).flat):
        axes.imshow(np.sqrt(weights[i // N, i % N]), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {i // N + 1}, head {i % N + 1}", fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#dddddd")
    save(picture, path)


def draw_sampler(sampled: tour_recorder.SampledToken, decode_bytes, path: Path) -> None:
    """The likeliest tokens after prefill, before and after each setting."""
    stages = sampled.stages
    top = np.argsort(-stages["the model"], kind="stable")[:10]
    words = [display_tokens([token], decode_bytes)[0].text for token in top.tolist()]
    picture = figure(9, 2.8)
    for axes, (name, probs) in zip(
        picture.subplots(1, len(stages), sharex=True), stages.items(), strict=True
    ):
        axes.barh(
            range(10), probs[top], color=[ORANGE if t == sampled.token else BLUE for t in top]
        )
        axes.set_title(f"{name}: {np.count_nonzero(probs):,} left", fontsize=10)
        axes.set_yticks(range(10), words if name == "the model" else [])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:.0%}")
    save(picture, path)


def main() -> None:
    """Record the tour once and draw each picture from it."""
    command = tyro.cli(Command, description=__doc__)
    model = load(command.run)
    settings = Settings(max_new_tokens=6, temperature=0.8, top_k=50, top_p=0.9)
    record = tour_recorder.record_tour(model, command.prompt, settings)
    decode_bytes = model.tokenizer.decode_bytes
    ids = [*record.prompt_ids, *(sampled.token for sampled in record.sampled)]
    words = [spelled.text for spelled in display_tokens(ids, decode_bytes)]
    draw_regimes(record, words, command.out / "regimes.svg")
    draw_scores(record, words, command.out / "attention.svg")
    draw_heads(record, command.out / "heads.svg")
    draw_sampler(record.sampled[0], decode_bytes, command.out / "sampler.svg")


if __name__ == "__main__":
    main()
