"""train.py --verify-resume: says what it compared, notices a difference, leaves nothing behind."""

import dataclasses
import tempfile

import jax
import numpy as np
import pytest
from programs import TINY, call, snapshot

from gpt.training import resume, train_step


@pytest.fixture
def argv(text, tmp_path, monkeypatch):
    """The flags, in a world where what is left behind is seen."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return [*TINY, "--ema-decay", "0.9", "--data", text, "--verify-resume", "--out"]


@pytest.mark.exact
def test_it_proves_it_on_the_settings_given(argv, tmp_path):
    done = call("train", *argv, tmp_path / "run")
    assert done.code == 0, done.err
    compared = [line for line in done.err.splitlines() if line.startswith("compared")]
    assert all(line.endswith("equal to the bit") for line in compared)
    parts = [line.removeprefix("compared").strip().split(",")[0] for line in compared]
    assert parts == ["weights", "optimizer and step", "average", "metrics"]
    assert "metrics, 8 lines" in compared[-1]
    assert "grad_norm" in compared[-1] and "val_loss" in compared[-1]
    assert "verified       3 steps, a stop and 3 more equal 6 steps at once" in done.err
    assert snapshot(tmp_path) == {}


def test_it_notices_what_a_stop_loses(argv, tmp_path, monkeypatch):
    """As if the second moments were not saved, or the noise came from a stream of its own."""
    honest = resume.load_state

    def forgetful(like, folder, at):
        loaded = honest(like, folder, at)
        forget = lambda a: a * np.float32(1 + 1e-6) if a.ndim else a  # noqa: E731
        return dataclasses.replace(loaded, opt_state=jax.tree.map(forget, loaded.opt_state))

    monkeypatch.setattr(resume, "load_state", forgetful)
    done = call("train", *argv, tmp_path / "run")
    assert done.code == 1
    assert "NOT verified" in done.err and "differs, " in done.err and "Traceback" not in done.err
    assert snapshot(tmp_path) == {}


def test_a_run_that_is_there_is_not_touched(trained, argv, monkeypatch):
    before = snapshot(trained[1])
    monkeypatch.setattr(train_step, "compile_steps", lambda *_: pytest.fail("it is refused before"))
    done = call("train", *argv, trained[1], "--steps", "1")
    assert done.code == 2 and "--steps 2 or more" in done.err
    assert snapshot(trained[1]) == before
