"""SIGTERM, Ctrl-C and their like in each phase of a run: what is left, and that it continues to
the bit."""

import os
import shutil
import signal
import sys

import pytest
from programs import TINY, arrays, call, read_lines, run_python, same_bits, snapshot, succeed

from gpt import checkpoint, cli
from gpt.evaluate import in_training
from gpt.training import evaluation, run, step_functions
from gpt.training.recorder import Recorder
from gpt.training.stop_signal import StopSignal


def before(monkeypatch, owner, name, action):
    """Have `action` happen just before a function is called for the first time."""
    honest, left = getattr(owner, name), [None]

    def watched(*arguments, **named):
        if left:
            left.pop()
            action()
        return honest(*arguments, **named)

    monkeypatch.setattr(owner, name, watched)


PHASES = {  # the function that is interrupted, and the step that is saved
    "training": (Recorder, "note_step", 1),
    "evaluating": (evaluation, "evaluate", 5),
    "sampling": (in_training, "write_sample", 8),
    "saving": (Recorder, "save", 5),
    "at its end": (run, "save_loss_curve", 12),
}
BY_DEFAULT = [("training", "SIGINT"), ("at its end", "SIGTERM")]
OTHERS = [(p, s) for p in PHASES for s in ("SIGTERM", "SIGINT") if (p, s) not in BY_DEFAULT]


@pytest.mark.parametrize(
    ("phase", "name"),
    BY_DEFAULT + [pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS],
)
def test_a_signal_in_any_phase_saves_at_the_next_step(
    phase, name, text, trained, tmp_path, monkeypatch
):
    """With dropout and two micro-batches: weights, both moments, the step and the metrics."""
    number = signal.Signals[name]
    argv = [*TINY, "--data", text, "--out", tmp_path / "run"]
    owner, function, saved = PHASES[phase]
    before(monkeypatch, owner, function, lambda: os.kill(os.getpid(), number))
    done = call("train", *argv)
    assert done.code == 128 + number, done.err
    assert cli.command("train.py", "--resume", str(tmp_path / "run")) + "\n" in done.err
    assert "Ctrl-C again stops at once" in done.err and "Traceback" not in done.err
    assert checkpoint.saved_steps(tmp_path / "run")[-1] == saved
    assert read_lines(tmp_path / "run") == [x for x in read_lines(trained[1]) if x["step"] <= saved]
    monkeypatch.undo()
    succeed("train", "--resume", tmp_path / "run")
    assert same_bits(arrays(tmp_path / "run", 12), arrays(trained[1], 12))
    assert read_lines(tmp_path / "run") == read_lines(trained[1])


def test_a_signal_before_the_first_step_leaves_everything_as_it_was(
    text, finished, tmp_path, monkeypatch
):
    """As while the step is compiled: of a new run, and of one that would be overwritten."""
    before_it = snapshot(tmp_path)
    for out in (tmp_path / "new", finished):
        monkeypatch.setattr(os, "_exit", sys.exit)
        before(
            monkeypatch,
            step_functions,
            "compile_steps",
            lambda: signal.raise_signal(signal.SIGUSR1),
        )
        done = call("train", *TINY, "--data", text, "--out", out, "--overwrite")
        assert done.code == 128 + signal.SIGUSR1 and "nothing new is saved" in done.err
        monkeypatch.undo()
    assert snapshot(tmp_path) == before_it


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_every_signal_that_ends_programs_is_noted(name, monkeypatch):
    number, log = signal.Signals[name], []
    # The tests themselves may have been started by nohup, which ignores SIGHUP.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    with StopSignal(log.append, lambda: None) as stop:
        with pytest.raises(KeyboardInterrupt) as interrupt:
            signal.raise_signal(number)
        assert interrupt.value.args == (128 + number,)  # nothing could be lost yet
        stop.defer(steps_done=0)
        signal.raise_signal(number)
        assert stop.must_end_after(1)
    assert stop.code == 128 + number and len(log) == 1


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup ignores SIGHUP."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(pytest.fail, lambda: None) as stop:
            stop.defer(steps_done=0)
            signal.raise_signal(signal.SIGHUP)
            assert not stop.must_end_after(1)
    finally:
        signal.signal(signal.SIGHUP, previous)


INTERRUPTED = """
import os, signal, sys, time
sys.path.insert(0, "tests")
from gpt import cli
import programs
from gpt.training import recorder

train = programs.program("train")

def stuck(*arguments, **named):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
    import jax  # out of Python, as a compilation is
    jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: x @ x / 2, x))(
        jax.numpy.eye(500)).block_until_ready()

recorder.Recorder.save = stuck
cli.run(train.main)
"""


def test_a_second_ctrl_c_stops_at_once_and_harms_nothing(text, trained, finished):
    shutil.rmtree(checkpoint.step_dir(finished, 12))
    good = arrays(finished, 8)
    argv = [*TINY, "--data", text, "--out", finished]
    # It gives up long before what it is stuck in ends.
    done = run_python("-c", INTERRUPTED, *argv)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert same_bits(arrays(finished, 8), good)
    succeed("train", *argv)
    assert checkpoint.saved_steps(finished) == [8, 12]
    assert same_bits(arrays(finished, 12), arrays(trained[1], 12))
    assert read_lines(finished) == read_lines(trained[1])
