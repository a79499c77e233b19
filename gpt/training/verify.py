"""--verify-resume: check that a resumed run equals an uninterrupted one, bit for bit."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gpt import checkpoint
from gpt.errors import require
from gpt.training.metrics import read_metrics
from gpt.training.resume import StartingPoint, initial_state
from gpt.training.run import Run
from gpt.training.step_timer import SPEED_FIELDS
from gpt.training.train_state import TrainState

NOT_COMPARED = {"seconds", *SPEED_FIELDS}  # these depend on the clock and the process
NAMES = {"params": "weights", "optimizer": "optimizer and step", "ema_params": "average"}
MOST_STEPS = 3  # before the stop, and again after it


def verify_resume(
    run: Run,
    fit: Callable[[Run, TrainState, int], None],
    log: Callable[[str], None],
) -> int:
    """Train 2N steps without a stop, then N, a stop and N more; compare. Returns the exit code.

    `fit(run, state, until)` trains from `state` until step `until` is saved. Everything is written
    to a temporary folder.
    """
    config = run.config
    require(config.steps > 1, "--verify-resume stops halfway: it needs --steps 2 or more")
    n = min(MOST_STEPS, config.steps // 2)
    # None of these changes affects what is learned, so the compiled step is the run's own.
    config = dataclasses.replace(
        config, log_every=1, eval_every=n, save_every=n, sample_every=0, keep_going=False
    )
    args = dataclasses.replace(run.args, profile=0, log_to=())
    run = dataclasses.replace(run, config=config, args=args, console=Console(quiet=True))

    with tempfile.TemporaryDirectory(prefix="gpt-jax-verify-") as temporary:
        whole = Path(temporary) / "whole"
        halves = Path(temporary) / "halves"
        for folder, steps_done, until in ((whole, 0, 2 * n), (halves, 0, n), (halves, n, 2 * n)):
            folder.mkdir(exist_ok=True)
            log(f"verifying      steps {steps_done + 1} to {until}, {folder.name}")
            from_here = StartingPoint(folder, resuming=True) if steps_done else run.start
            state = initial_state(config, run.mesh, from_here, log)
            fit(dataclasses.replace(run, out=folder), state, until)
            if run.stop.code:
                return run.stop.code
        compared = compare_runs(whole, halves, 2 * n)

    for part, differing in compared.items():
        result = "equal bit for bit"
        if differing:
            result = f"{differing[0]} differs, {len(differing)} in all"
        log(f"compared       {part}: {result}")
    if any(compared.values()):
        log(f"NOT verified   {n} steps, a stop and {n} more differ from {2 * n} without a stop")
        return 1
    log(f"verified       {n} steps, a stop and {n} more equal {2 * n} without a stop")
    return 0


def compare_runs(one: Path, other: Path, step: int) -> dict[str, list[str]]:
    """The differences between two runs: the arrays of each tree in the checkpoints at `step`, and
    the lines of their metrics. Arrays are compared by digests that cover every bit."""
    first = checkpoint.read_record(one, step)["arrays"]
    second = checkpoint.read_record(other, step)["arrays"]
    compared = {}
    for tree, arrays in first.items():
        part = f"{NAMES[tree]}, {len(arrays)} arrays"
        compared[part] = [name for name in arrays if arrays[name] != second[tree].get(name)]

    lines = []
    for folder in (one, other):
        records = read_metrics(folder / "metrics.jsonl")
        lines.append([{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in records])
    only_in_one = [line for line in lines[0] if line not in lines[1]]
    only_in_one += [line for line in lines[1] if line not in lines[0]]
    names = sorted({name for line in lines[0] for name in line})
    part = f"metrics, {len(lines[0])} lines: {', '.join(names)}"
    compared[part] = [f"the line of step {line['step']}" for line in only_in_one]
    return compared
