"""Prefill and decode, measured apart, as fractions of what this machine can do.

    python -m gpt.bench runs/tiny
    python -m gpt.bench --preset gpt2 --prompt-lengths 128,512 --batch-sizes 1,8

Prints a card and a table; the last line of standard output is the whole result as JSON.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from gpt import cli
from gpt.config import Dtype
from gpt.errors import require
from gpt.presets import preset

PROMPT_LENGTHS = (128, 512)
NEW_TOKENS = 64


@dataclass(frozen=True)
class Command:
    """What to measure."""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """A run's folder, as train.py made it."""
    preset: str | None = None
    """Random weights of this preset in place of a checkpoint (default: tiny)."""
    prompt_lengths: str | None = None
    """Tokens a prompt, with commas between (default: those of 128,512 that fit the context)."""
    batch_sizes: str = "1,8"
    """Rows read and decoded together, with commas between."""
    new_tokens: int | None = None
    """Tokens drawn a row, the first by the prefill (default: 64, or half a shorter context)."""
    repeats: int = 5
    """Times that each cell is measured, after one that compiles."""
    dtype: Dtype | None = None
    """Type of the computation (default: float32 on CPU, bfloat16 on accelerators)."""
    json: Path | None = None
    """Write the result to this file too."""


def numbers(flag: str, text: str) -> list[int]:
    """`8,1,8` as [1, 8]; UserError unless all are whole numbers of at least 1."""
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError:
        found = [0]
    require(
        found[0] >= 1, f"{flag} {text}: expected whole numbers from 1, commas between: {flag} 1,8"
    )
    return found


def lengths(command: Command, context: int) -> tuple[list[int], int]:
    """Prompt lengths and new tokens; what the user left open fits `context`.

    UserError if what the user gave does not.
    """
    text = command.prompt_lengths
    given = numbers("--prompt-lengths", text) if text is not None else []
    room = max(context - given[-1], 2) if given else context // 2
    new = command.new_tokens or min(NEW_TOKENS, room)
    found = given or [n for n in PROMPT_LENGTHS if n + new <= context] or [max(context - new, 1)]
    require(
        found[-1] + new <= context,
        f"prompts of {found[-1]} tokens and {new} new ones exceed the model's context of "
        f"{context}: choose fewer by --prompt-lengths and --new-tokens",
    )
    return found, new


def check(command: Command) -> None:
    """UserError for what can be refused before anything is loaded."""
    require(
        not (command.checkpoint and command.preset),
        "a checkpoint and --preset exclude each other: choose one",
    )
    require(command.repeats >= 1, f"--repeats {command.repeats}: expected at least 1")
    require(
        command.new_tokens is None or command.new_tokens >= 2,
        f"--new-tokens {command.new_tokens}: expected at least 2, since decoding begins with the "
        "second",
    )
    if command.json:
        folder = command.json.absolute().parent
        require(folder.is_dir(), f"--json {command.json}: there is no folder {folder}; make it")
        require(not command.json.is_dir(), f"--json {command.json}: is a folder; name a file in it")


def model(command: Command):
    """Name and config of what is measured, and a function that makes its unstacked weights."""
    import jax

    from gpt.model import transformer
    from gpt.sampling.language_model import load, platform_dtype

    if command.checkpoint:
        loaded = load(command.checkpoint, dtype=command.dtype)
        return f"{command.checkpoint}, step {loaded.step}", loaded.config, lambda: loaded.params
    name = command.preset or "tiny"
    config = preset(name).model.computing_in(command.dtype or platform_dtype())
    make = jax.jit(lambda: transformer.unstack(transformer.init(config, jax.random.key(0))))
    return f"{name}, random weights", config, make


def main(argv: list[str]) -> None:
    """Measure every cell and show the result."""
    command = cli.parse(Command, argv, program="python -m gpt.bench", description=__doc__)
    check(command)
    batches = numbers("--batch-sizes", command.batch_sizes)
    cli.prepare_jax(cache=False)  # a program read from a disk would not show what compiling costs
    from rich.console import Console
    from rich.progress import track

    from gpt import probe
    from gpt.bench import card, measure
    from gpt.sharding import on_mesh

    name, config, weights = model(command)
    prompt_lengths, new = lengths(command, config.context_length)
    if command.prompt_lengths is None and tuple(prompt_lengths) != PROMPT_LENGTHS:
        fitted = f"prompts of {prompt_lengths[-1]} tokens and {new} new ones"
        print(f"note: {fitted} fit the context of {config.context_length}", file=sys.stderr)
    cells = [measure.Cell(batch, n, new) for batch in batches for n in prompt_lengths]
    ceilings = probe.ceilings(measure.step_cost(config, cells[-1])[0], config.compute_dtype)
    result = card.about(name, config, ceilings, os.cpu_count()) | {"repeats": command.repeats}
    params = weights()
    watched = track(cells, "measuring", console=Console(stderr=True), transient=True)
    result["cells"] = [
        measure.measure(config, params, cell, command.repeats, ceilings) for cell in watched
    ]
    Console(width=card.WIDTH).print(card.drawing(result))
    line = json.dumps(result)
    if command.json:
        command.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    cli.run(main)
