"""Killed at any moment, and started again by the same command: nothing is lost, nothing is bent."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from programs import ROOT, SHAPE, read_lines

from gpt import checkpoint

pytestmark = pytest.mark.slow
LAST, KILLS = 600, 37
RUN = [
    *SHAPE, "--steps", str(LAST), "--warmup-steps", "20", "--model.dropout", "0.1",
    "--learning-rate", "1e-3", "--min-learning-rate", "1e-4", "--ema-decay", "0.9",
    "--log-every", "1", "--eval-every", "7", "--eval-tokens", "64", "--save-every", "5",
    "--sample-every", "0", "--keep", "2", "--keep-best", "1",
]  # fmt: skip
# What a run says or leaves, and the longest wait in seconds after which it is killed.
MOMENTS = {
    "at once": 4.0, "text": 1.0, "parameters": 4.0, "compiled": 0.3, "validation": 0.2,
    "saving": 0.05, "saving ": 0.2, "loss curve": 0.05,
}  # fmt: skip


def start(argv, log, **surroundings):
    words = [sys.executable, ROOT / "train.py", *map(str, argv)]
    return subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | surroundings)


def wait_for(moment: str, process, log, run) -> None:
    """Until the run has said `moment`, is in a save, or has ended."""
    place, until = run / "checkpoints", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if moment == "at once" or moment in log.read_text(errors="replace"):
            return
        if "saving" in moment and any("tmp" in path.name for path in place.glob("*")):
            return
        time.sleep(0.002)


def kill_once(moment, delay, argv, run, log) -> int:
    """Start the run, kill it at about that moment; how it ended, without a complaint."""
    fresh = {"JAX_ENABLE_COMPILATION_CACHE": "0"} if moment == "parameters" else {}
    with log.open("wb") as file:
        process = start(argv, file, **fresh)
        try:
            wait_for(moment, process, log, run)
            time.sleep(delay)
        finally:
            process.kill()
    code, said = process.wait(), log.read_text(errors="replace")
    assert code in (0, -signal.SIGKILL) and "Traceback" not in said and "error: " not in said, said
    return code


def moment_of(kills: int) -> str:
    """All moments in turn; the end of a run, for which it must get there, only after 35 kills."""
    *before_the_end, end = MOMENTS
    return before_the_end[kills % len(before_the_end)] if kills < 35 else end


def check_equal(run, unkilled):
    """Weights, optimizer, step, average and metrics are those of a run that nobody killed."""
    assert checkpoint.steps(run)[-1] == LAST
    arrays, expected = (checkpoint.read_record(f, LAST)["arrays"] for f in (run, unkilled))
    assert arrays == expected  # shapes, types and digests of all trees
    assert read_lines(run) == read_lines(unkilled)
    steps = [line["step"] for line in read_lines(run) if "loss" in line]
    assert steps == list(range(1, LAST + 1))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_kills_at_any_moment_change_nothing(text, tmp_path):
    chance, log = random.Random(0), tmp_path / "log"
    unkilled, killed, rounds = tmp_path / "unkilled", Counter(), 0
    with log.open("wb") as file:
        assert start([*RUN, "--data", text, "--out", unkilled], file).wait() == 0, log.read_text()
    while sum(killed.values()) < KILLS:  # a run that gets to its end is followed by another
        rounds += 1
        run = tmp_path / f"run{rounds}"
        argv, code = [*RUN, "--data", text, "--out", run], -1
        while code:
            moment = moment_of(sum(killed.values()))
            code = kill_once(moment, chance.random() * MOMENTS[moment], argv, run, log)
            killed[moment] += code != 0
        check_equal(run, unkilled)
    print(f"{rounds} runs, killed {dict(killed)}")
