"""Training in several real processes on this machine: what one trains, together or not at all."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from programs import ROOT, TINY, arrays, free_port, read_lines, same_losses, succeed

from gpt import checkpoint
from gpt.training.metrics import read_metrics

SMALL = [*TINY, "--batch-size", "8"]  # as in test_mesh.py: compiled once for both
NEVER = "100000"
ENDLESS = [*SMALL, "--steps", NEVER, "--eval-every", NEVER, "--sample-every", "0"]
ENDLESS += ["--save-every", NEVER]
HEARTBEAT = 10  # seconds, where the death of a process is tested


class Trainer(subprocess.Popen):
    """One process of a run, and what it has said when it has ended."""

    err = ""


@contextlib.contextmanager
def training(n: int, *argv, own=lambda i: ()):
    """`n` processes of train.py with the same flags, beside `own(i)`; none outlives the block."""
    # Compiling is all that takes time.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    where = ["--coordinator", f"localhost:{free_port()}", "--num-processes", n, "--process-id"]
    started = []
    try:
        for i in range(n):
            words = [sys.executable, ROOT / "train.py", *argv, *own(i)]
            words += [*where, i] if n > 1 else ["--num-processes", 1]
            words = [str(word) for word in words]
            started.append(Trainer(words, env=env, stderr=subprocess.PIPE, text=True))
        yield started
    finally:
        for trainer in started:
            trainer.kill()
            trainer.communicate()


def wait(trainers: list[Trainer], seconds: float = 300) -> None:
    """Until all have ended by themselves."""
    for trainer in trainers:
        trainer.err = trainer.communicate(timeout=seconds)[1]


def run(n: int, *argv) -> list[Trainer]:
    """A run of `n` processes to its end."""
    with training(n, *argv) as trainers:
        wait(trainers)
    assert [t.returncode for t in trainers] == [0] * n, "\n".join(t.err for t in trainers)
    return trainers


def wait_for_steps(trainers: list[Trainer], folder, n: int = 5) -> None:
    """Until a run has made a few steps; none of its processes may end before, or hang."""
    until = time.monotonic() + 300
    while len(read_metrics(folder / "metrics.jsonl")) < n:
        assert [t.poll() for t in trainers] == [None] * len(trainers)
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The folder of the run that one process makes."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    succeed("train", *SMALL, "--data", text, "--out", folder)
    return folder


def test_two_processes_train_the_run_that_one_trains(text, alone, tmp_path):
    folder = tmp_path / "run"
    first, second = run(2, *SMALL, "--data", text, "--out", folder)
    assert "on 2 devices" in first.err and first.err.count("--- sample ---") == 2
    said = [line for line in second.err.splitlines() if "Gloo" not in line]
    assert len(said) == 1 and said[0].startswith("waiting  ")  # the rest is told by the first
    names = {"checkpoints", "loss.png", "metrics.jsonl", "samples.jsonl", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert [x["step"] for x in read_lines(folder)] == [x["step"] for x in read_lines(alone)]
    assert same_losses(folder, alone)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(text, alone, tmp_path):
    """Begun by two, continued by one, ended by four on another mesh."""
    folder = tmp_path / "run"
    argv = [*SMALL, "--keep", "3", "--data", text, "--out", folder]
    run(2, *argv, "--mesh.data", "1", "--mesh.fsdp", "2")
    shutil.rmtree(folder / "checkpoints" / "8")
    shutil.rmtree(folder / "checkpoints" / "12")
    (one,) = run(1, *argv)
    assert "continues      from step 4" in one.err
    shutil.rmtree(folder / "checkpoints" / "12")
    first, *_ = run(4, *argv, "--mesh.data", "2", "--mesh.fsdp", "2")
    assert "continues      from step 8" in first.err and "on 4 devices" in first.err
    assert same_losses(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("who", "number", "code"), [(1, "SIGTERM", 143), (0, "SIGINT", 130)])
def test_a_signal_to_one_stops_all_at_the_same_step(who, number, code, text, tmp_path):
    folder = tmp_path / "run"
    argv = [*ENDLESS, "--data", text, "--out", folder]
    with training(2, *argv) as trainers:
        wait_for_steps(trainers, folder)
        trainers[who].send_signal(signal.Signals[number])
        wait(trainers, 60)
    assert [t.returncode for t in trainers] == [code] * 2, trainers[0].err + trainers[1].err
    assert "stopped        to continue: " in trainers[0].err
    (saved,) = checkpoint.saved_steps(folder)
    assert saved == read_lines(folder)[-1]["step"] > 5
    assert int(arrays(folder, saved)["optimizer/step"]) == saved


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("who", [0, 1])
def test_when_one_dies_or_hangs_the_other_ends_too(who, how, text, tmp_path):
    folder = tmp_path / "run"
    argv = [*ENDLESS, "--save-every", "3", "--data", text, "--out", folder]
    with training(2, *argv, "--heartbeat", HEARTBEAT) as trainers:
        wait_for_steps(trainers, folder, 12)  # the third save waits for the second one
        trainers[who].send_signal(signal.Signals[how])
        began, other = time.monotonic(), trainers[1 - who]
        wait([other], 3 * HEARTBEAT + 30)
        assert time.monotonic() - began < 3 * HEARTBEAT + 30
    assert other.returncode not in (0, 2, 130, 143), other.err
    assert checkpoint.saved_steps(folder)


@pytest.mark.slow
def test_what_one_refuses_all_refuse(text, alone, tmp_path):
    folder = tmp_path / "run"
    argv = [*SMALL, "--data", text, "--out", folder, "--grad-accum", "auto"]
    missing = ["--data", tmp_path / "missing.txt"]
    for own, reason in (
        (lambda i: ["--seed", 7 + i], "the processes of a run must agree on the settings"),
        (lambda i: ["--memory-gb", 1 - 0.999 * i], "must agree on --grad-accum and --remat"),
        (lambda i: missing if i else [], "another process of this run reported an error"),
        (lambda i: [] if i else missing, "missing.txt"),
    ):
        with training(2, *argv, own=own) as trainers:
            wait(trainers)
        assert [t.returncode for t in trainers] == [2, 2], trainers[0].err + trainers[1].err
        assert all(t.err.count("error: ") == 1 for t in trainers)
        assert reason in trainers[0].err
        assert not folder.exists()
