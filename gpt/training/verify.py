"""Whether a run that is stopped and continued is one that is not: compared to the bit.

How a step is made is the caller's matter.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from gpt import checkpoint
from gpt.config import TrainConfig
from gpt.digest import bits_of, named_leaves
from gpt.errors import require
from gpt.training import saving, speed
from gpt.training.metrics import read_metrics
from gpt.training.train_step import TrainState, abstract_state, stored

# What a line says of the clock and the process; all else is computed.
OF_TIME = {"seconds", *speed.FIELDS}
NAMES = {"params": "weights", "rest": "optimizer and step", "average": "average"}
HALF = 3  # steps before the stop, and after it


def shorten(config: TrainConfig) -> tuple[TrainConfig, int]:
    """The run's settings with a line for each step and an evaluation after N, and N.

    None of these changes what is learned, so the compiled step is the run's own.
    """
    require(config.steps > 1, "--verify-resume stops in the middle: it takes --steps 2 or more")
    n = min(HALF, config.steps // 2)
    often = {"log_every": 1, "eval_every": n, "save_every": n, "sample_every": 0}
    return dataclasses.replace(config, keep_going=False, **often), n


def verify_run(run: Any, source: Path | None, tell: Callable[[str], None]) -> int:
    """`verify_resume` of a run, a dataclass with `config`, `command`, `console`, `mesh`, `out`,
    `until` and `execute(state, first)`, that begins with the weights in `source` or with none."""
    config, n = shorten(run.config)
    command = dataclasses.replace(run.command, profile=0, tensorboard=False)
    run = dataclasses.replace(run, config=config, command=command, console=Console(quiet=True))

    def go(folder: Path, first: int, until: int) -> int:
        state = saving.begin(config, run.mesh, folder if first else source, first > 0, tell)
        return dataclasses.replace(run, out=folder, until=until).execute(state, first)

    return verify_resume(config, run.mesh, n, go, tell)


def verify_resume(
    config: TrainConfig,
    mesh: Mesh,
    n: int,
    go: Callable[[Path, int, int], int],
    tell: Callable[[str], None],
) -> int:
    """Make 2N steps, and N steps, a stop and N more; `tell` what was compared. The exit code.

    `go(folder, first, until)` trains there from step `first` on, until step `until` is saved; its
    exit code. All is in a temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="gpt-jax-verify-") as place:
        whole, halves = Path(place) / "whole", Path(place) / "halves"
        for folder, first, until in ((whole, 0, 2 * n), (halves, 0, n), (halves, n, 2 * n)):
            folder.mkdir(exist_ok=True)
            tell(f"verifying      steps {first + 1} to {until}, {folder.name}")
            if code := go(folder, first, until):
                return code
        compared = compare_runs(abstract_state(config, mesh), 2 * n, whole, halves)
    for what, difference in compared:
        tell(f"compared       {what}: {difference or 'equal to the bit'}")
    if any(difference for _, difference in compared):
        tell(f"NOT verified   {n} steps, a stop and {n} more do not equal {2 * n} at once")
        return 1
    tell(f"verified       {n} steps, a stop and {n} more equal {2 * n} steps at once")
    return 0


def compare_runs(like: TrainState, step: int, one: Path, other: Path) -> list[tuple[str, str]]:
    """What was compared between the checkpoints of step `step` in two folders, and between their
    metrics: a line for each part, and the first difference in it, or "".
    """
    lines = []
    for tree, abstract in stored(like).items():
        sides = [checkpoint.restore(folder, step, tree, abstract) for folder in (one, other)]
        first, second = map(named_leaves, sides)
        different = [name for name in first if not same_bits(first[name], second[name])]
        size = sum(leaf.nbytes for leaf in first.values())
        lines.append((f"{NAMES[tree]}, {len(first)} arrays, {size:,} bytes", first_of(different)))
    return [*lines, compare_metrics(one, other)]


def compare_metrics(one: Path, other: Path) -> tuple[str, str]:
    """As compare_runs, of the lines that two runs have written."""
    first, second = (
        [{k: v for k, v in line.items() if k not in OF_TIME} for line in read_metrics(path)]
        for path in (one / "metrics.jsonl", other / "metrics.jsonl")
    )
    fields = sorted({name for line in first for name in line})
    different = [f"step {line.get('step')}" for line in first if line not in second] + [
        f"step {line.get('step')}" for line in second if line not in first
    ]
    same_order = first == second or bool(different)
    what = f"metrics, {len(first)} lines: {', '.join(fields)}"
    return what, first_of(different) if same_order else "the order of the lines"


def first_of(names: list[str]) -> str:
    """A few words about what differs."""
    return f"{names[0]} differs" + (f", {len(names)} in all" if names[1:] else "") if names else ""


@jax.jit
def equal_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether all bits are the same: NaN equals itself, and zero is not minus zero."""
    return jnp.all(bits_of(a) == bits_of(b))


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    """Whether two arrays of one tree have one shape, one type and the same bits."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and bool(equal_bits(a, b))
