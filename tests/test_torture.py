"""Killed at any moment, and started again by the same command: nothing is lost, nothing is bent."""

import random
import signal
import subprocess
import sys
import time

import pytest
from programs import ROOT, SHAPE, read_lines

from gpt import checkpoint

LAST, KILLS = 600, 37
RUN = [
    *SHAPE, "--steps", str(LAST), "--warmup-steps", "20", "--model.dropout", "0.1",
    "--learning-rate", "1e-3", "--min-learning-rate", "1e-4", "--ema-decay", "0.9",
    "--log-every", "1", "--eval-every", "7", "--eval-tokens", "64", "--save-every", "5",
    "--sample-every", "0", "--keep", "2", "--keep-best", "1",
]  # fmt: skip
# What a run says, or "saving", and the longest wait in seconds after which it is killed.
MOMENTS = {"": 4.0, "text": 1.0, "parameters": 4.0, "compiled": 0.3, "validation": 0.2}
MOMENTS |= {"saving": 0.1, "loss curve": 0.05}


def kill_once(moment, delay, argv, run, log) -> int:
    """Start the run, kill it `delay` seconds after that moment; how it ended, without complaint."""
    words = [sys.executable, ROOT / "train.py", *map(str, argv)]
    with log.open("wb") as file, subprocess.Popen(words, stdout=file, stderr=file) as process:
        while process.poll() is None and moment not in log.read_text(errors="replace"):
            if moment == "saving" and list(run.glob("checkpoints/*tmp*")):
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
    said = log.read_text(errors="replace")
    assert process.returncode in (0, -signal.SIGKILL), said
    assert "Traceback" not in said and "error: " not in said, said
    return process.returncode


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(text, tmp_path):
    chance, log = random.Random(0), tmp_path / "log"
    unkilled, kills, rounds = tmp_path / "unkilled", 0, 0
    assert kill_once("sample it", 60, [*RUN, "--data", text, "--out", unkilled], unkilled, log) == 0
    while kills < KILLS:  # a run that gets to its end is followed by another
        rounds += 1
        run = tmp_path / f"run{rounds}"
        argv, code = [*RUN, "--data", text, "--out", run], -1
        while code:
            moment = list(MOMENTS)[kills % len(MOMENTS)]
            code = kill_once(moment, chance.random() * MOMENTS[moment], argv, run, log)
            kills += code != 0
        records = [checkpoint.read_record(folder, LAST) for folder in (run, unkilled)]
        assert records[0]["arrays"] == records[1]["arrays"]  # shapes, types, digests of all trees
        assert read_lines(run) == read_lines(unkilled)
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
