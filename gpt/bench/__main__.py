"""Prefill and decode, measured apart, as fractions of what this machine can do.

    python -m gpt.bench runs/tiny
    python -m gpt.bench --preset gpt2 --prompt-lengths 128,512 --batch-sizes 1,8

Prints a card and a table; the last line of standard output is the whole result as JSON.
"""

import dataclasses
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from gpt import cli
from gpt.config import ONE_DEVICE, Dtype, MeshConfig, Quantize
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
    batch_sizes: str | None = None
    """Rows read and decoded together, with commas between (default: 1,8; with --train the
    preset's)."""
    new_tokens: int | None = None
    """Tokens drawn a row, the first by the prefill (default: 64, or half a shorter context)."""
    train: bool = False
    """Measure the training step of the preset, by batch size, and not sampling."""
    repeats: int = 5
    """Times that each cell is measured, after one that compiles."""
    dtype: Dtype | None = None
    """Type of the computation (default: float32 on CPU, bfloat16 on accelerators)."""
    quantize: Quantize | None = None
    """Keep matrices and tables as int8."""
    mesh: MeshConfig = ONE_DEVICE
    json: Path | None = None
    """Write the result to this file too."""
    plot: Path | None = None
    """Draw prefill and decode under the machine's roof, to this .png or .svg."""
    compare: tuple[Path, Path] | None = None
    """Measure nothing: compare two results of --json, the older first."""
    fail_if_slower: str | None = None
    """With --compare: exit code 1 if a figure is slower by more than this share, such as 5%, and
    by more than the noise."""
    formulas: bool = False
    """Measure nothing: print how FLOPs and bytes are counted."""


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
    for flag, path in (("--json", command.json), ("--plot", command.plot)):
        if path:
            folder = path.absolute().parent
            require(folder.is_dir(), f"{flag} {path}: there is no folder {folder}; make it")
            require(not path.is_dir(), f"{flag} {path}: is a folder; name a file in it")
    if command.plot:
        good = command.plot.suffix in (".png", ".svg")
        require(good, f"--plot {command.plot}: expected a name that ends in .png or .svg")
    others = {"--plot": command.plot, "--new-tokens": command.new_tokens}
    others |= {"--prompt-lengths": command.prompt_lengths, "a checkpoint": command.checkpoint}
    others |= {"--quantize": command.quantize}
    idle = [flag for flag, value in others.items() if value and command.train]
    require(not idle, f"--train measures a preset's training step: drop {' and '.join(idle)}")
    require(
        command.compare is not None or command.fail_if_slower is None,
        "--fail-if-slower is for --compare: add it or drop it",
    )


def model(command: Command):
    """Name and config of what is measured, its mesh, and a function that makes its weights."""
    import jax

    from gpt import sharding
    from gpt.model import transformer
    from gpt.sampling.language_model import for_decoding, load, platform_dtype

    if command.checkpoint:
        loaded = load(
            command.checkpoint, dtype=command.dtype, mesh=command.mesh, quantize=command.quantize
        )
        name = f"{command.checkpoint}, step {loaded.step}"
        return name, loaded.config, loaded.mesh, lambda: loaded.params
    name, mesh = command.preset or "tiny", sharding.make_decoding_mesh(command.mesh)
    config = preset(name).model.computing_in(command.dtype or platform_dtype())
    transformer.require_fit(config, mesh, fsdp=False)

    weights, key = partial(transformer.init, config), jax.random.key(0)
    make = partial(for_decoding, config, mesh, command.quantize, weights, key)
    return f"{name}, random weights", config, mesh, make


def measure_sampling(command: Command) -> dict:
    """Every cell of prefill and decode: the result."""
    from rich.console import Console
    from rich.progress import track

    from gpt import hardware
    from gpt.bench import card, measure
    from gpt.sharding import on_mesh

    name, config, mesh, weights = model(command)
    prompt_lengths, new = lengths(command, config.context_length)
    if command.prompt_lengths is None and tuple(prompt_lengths) != PROMPT_LENGTHS:
        fitted = f"prompts of {prompt_lengths[-1]} tokens and {new} new ones"
        print(f"note: {fitted} fit the context of {config.context_length}", file=sys.stderr)
    batches = numbers("--batch-sizes", command.batch_sizes or "1,8")
    int8 = command.quantize is not None
    cells = [measure.Cell(batch, n, new, int8) for batch in batches for n in prompt_lengths]
    measure.require_room(config, cells[-1])
    ceilings = hardware.ceilings(measure.step_cost(config, cells[-1])[0], config.compute_dtype)
    result = card.about(name, config, ceilings, os.cpu_count(), int8) | {"repeats": command.repeats}
    params = weights()
    watched = track(cells, "measuring", console=Console(stderr=True), transient=True)
    with on_mesh(mesh):
        result["cells"] = [
            measure.measure(config, params, cell, command.repeats, ceilings) for cell in watched
        ]
    return result


def measure_training(command: Command) -> dict:
    """The training step at every batch size: the result."""
    from gpt import flops, hardware, sharding
    from gpt.bench import card, train
    from gpt.sampling.language_model import platform_dtype

    name = command.preset or "tiny"
    config, dtype = preset(name), command.dtype or platform_dtype()
    config = dataclasses.replace(config, model=config.model.computing_in(dtype), dtype=dtype)
    mesh = sharding.make_decoding_mesh(command.mesh)
    sizes = command.batch_sizes or str(config.batch_size)
    ceilings = hardware.ceilings(flops.weight_bytes(config.model), dtype)
    result = card.about(name, config.model, ceilings, os.cpu_count())
    cells = [
        train.measure(dataclasses.replace(config, batch_size=size), mesh, command.repeats, ceilings)
        for size in numbers("--batch-sizes", sizes)
    ]
    return result | {"repeats": command.repeats, "cells": cells}


def compare(command: Command) -> int:
    """Print what changed between two results; 1 if it is worse than allowed."""
    from rich.console import Console

    from gpt.bench import compare

    allowed = compare.parse_share(command.fail_if_slower or "0%")
    old, new = (compare.read(path) for path in command.compare)
    changes = list(compare.compare(old, new))
    for line in compare.differing_settings(old, new):
        print(f"note: {line}", file=sys.stderr)
    Console(width=160).print(compare.table(changes))
    slow = compare.too_slow(changes, allowed) if command.fail_if_slower else []
    for change in slow:
        print(f"{change.cell}: {change.name} is slower by {change.ratio - 1:.0%}", file=sys.stderr)
    return 1 if slow else 0


def main(argv: list[str]) -> int:
    """Measure every cell and show the result; the exit code."""
    command = cli.parse(Command, argv, program="python -m gpt.bench", description=__doc__)
    check(command)
    if command.formulas:
        from gpt import flops

        print(flops.describe())
        return 0
    if command.compare:
        return compare(command)
    # A cache of its own: what lies in the user's would not show what compiling costs.
    with tempfile.TemporaryDirectory() as folder:
        cli.prepare_jax(cache_dir=folder)
        result = measure_training(command) if command.train else measure_sampling(command)
    show(command, result)
    return 0


def show(command: Command, result: dict) -> None:
    """Card and table, the picture, the files; last the whole result as one line."""
    from rich.console import Console

    from gpt.bench import card, roofline

    Console(width=card.WIDTH).print(card.drawing(result))
    if command.plot:
        roofline.draw(result, command.plot)
    line = json.dumps(result)
    if command.json:
        command.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    cli.run(main)
