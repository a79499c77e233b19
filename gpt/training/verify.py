"""--verify-resume: a run that is stopped and continued equals one that is not, to the bit."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from gpt import checkpoint
from gpt.config import TrainConfig
from gpt.digest import bits_of, named_leaves
from gpt.errors import require
from gpt.training.metrics import read_metrics
from gpt.training.resume import StartingPoint, initial_state
from gpt.training.step_timer import SPEED_FIELDS
from gpt.training.train_state import TrainState, abstract_state, checkpoint_trees
from gpt.training.trainer import Run

NOT_COMPARED = {"seconds", *SPEED_FIELDS}  # they depend on the clock and the process
NAMES = {"params": "weights", "optimizer": "optimizer and step", "ema_params": "average"}
MOST_STEPS = 3  # before the stop, and after it


def shorten(config: TrainConfig) -> tuple[TrainConfig, int]:
    """The settings of the trial runs, and N: after how many steps they evaluate, save and stop.

    None of the changes alters what is learned, so the compiled step is that of the run itself.
    """
    require(config.steps > 1, "--verify-resume stops in the middle: it needs --steps 2 or more")
    n = min(MOST_STEPS, config.steps // 2)
    shortened = dataclasses.replace(
        config, log_every=1, eval_every=n, save_every=n, sample_every=0, keep_going=False
    )
    return shortened, n


def verify_resume(
    run: Run,
    fit: Callable[[Run, TrainState, int], int],
    log: Callable[[str], None],
) -> int:
    """Train 2N steps at once, and N steps, a stop and N more; compare. The exit code.

    `fit(run, state, until)` trains from `state` until step `until` is saved and returns the exit
    code. Everything is in a temporary folder.
    """
    config, n = shorten(run.config)
    args = dataclasses.replace(run.args, profile=0, tensorboard=False)
    run = dataclasses.replace(run, config=config, args=args, console=Console(quiet=True))

    with tempfile.TemporaryDirectory(prefix="gpt-jax-verify-") as temporary:
        whole = Path(temporary) / "whole"
        halves = Path(temporary) / "halves"
        for folder, first_step, until in ((whole, 0, 2 * n), (halves, 0, n), (halves, n, 2 * n)):
            folder.mkdir(exist_ok=True)
            log(f"verifying      steps {first_step + 1} to {until}, {folder.name}")
            from_here = StartingPoint(folder, resuming=True) if first_step else run.start
            state = initial_state(config, run.mesh, from_here, log)
            code = fit(dataclasses.replace(run, out=folder), state, until)
            if code:
                return code
        compared = compare_runs(abstract_state(config, run.mesh), 2 * n, whole, halves)

    for part, difference in compared:
        log(f"compared       {part}: {difference or 'equal to the bit'}")
    if any(difference for _, difference in compared):
        log(f"NOT verified   {n} steps, a stop and {n} more do not equal {2 * n} at once")
        return 1
    log(f"verified       {n} steps, a stop and {n} more equal {2 * n} steps at once")
    return 0


def compare_runs(like: TrainState, step: int, one: Path, other: Path) -> list[tuple[str, str]]:
    """Compare the checkpoints of `step` in two folders, and the metrics of both runs: each part
    with the first difference in it, or ""."""
    compared = []
    for name, abstract in checkpoint_trees(like).items():
        first = named_leaves(checkpoint.restore(one, step, name, abstract))
        second = named_leaves(checkpoint.restore(other, step, name, abstract))
        differing = [leaf for leaf in first if not same_bits(first[leaf], second[leaf])]
        n_bytes = sum(leaf.nbytes for leaf in first.values())
        part = f"{NAMES[name]}, {len(first)} arrays, {n_bytes:,} bytes"
        compared.append((part, describe_difference(differing)))
    compared.append(compare_metrics(one, other))
    return compared


def compare_metrics(one: Path, other: Path) -> tuple[str, str]:
    """The lines that two runs wrote, compared as in `compare_runs`."""

    def read(folder: Path) -> list[dict]:
        return [
            {name: value for name, value in line.items() if name not in NOT_COMPARED}
            for line in read_metrics(folder / "metrics.jsonl")
        ]

    first, second = read(one), read(other)
    names = sorted({name for line in first for name in line})
    part = f"metrics, {len(first)} lines: {', '.join(names)}"
    if first == second:
        return part, ""
    only_in_one = [line for line in first if line not in second]
    only_in_one += [line for line in second if line not in first]
    if not only_in_one:
        return part, "the order of the lines differs"
    return part, describe_difference([f"step {line.get('step')}" for line in only_in_one])


def describe_difference(names: list[str]) -> str:
    """The first of the names of what differs, and how many there are."""
    if not names:
        return ""
    if len(names) == 1:
        return f"{names[0]} differs"
    return f"{names[0]} differs, {len(names)} in all"


@jax.jit
def equal_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether all bits are equal: a NaN equals itself, and zero differs from minus zero."""
    return jnp.all(bits_of(a) == bits_of(b))


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    """Whether two arrays have the same shape, type and bits."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and bool(equal_bits(a, b))
