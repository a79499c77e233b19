"""What a run shows while it trains, which changes nothing: samples, speed, TensorBoard, traces."""

import gzip
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from programs import TINY, arrays, call, read_lines, same_bits, snapshot

from gpt import checkpoint
from gpt.errors import UserError
from gpt.sampling import language_model
from gpt.training import run_dir


def test_evaluation_and_samples_shift_neither_data_nor_noise(text, trained, tmp_path):
    """Without any, and with dropout: the same losses and the same weights, to the bit."""
    flags = ["--eval-every", "100", "--sample-every", "0", "--keep-best", "0"]
    done = call("train", *TINY, *flags, "--data", text, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    mine, other = (
        [(x["step"], x["loss"], x["grad_norm"]) for x in read_lines(folder) if "loss" in x]
        for folder in (tmp_path / "run", trained[1])
    )
    assert mine == other and len(mine) == 12
    assert same_bits(arrays(tmp_path / "run", 12), arrays(trained[1], 12))


class JaxRuntimeError(Exception):
    """As JAX names what XLA reports."""


def test_a_sample_that_does_not_fit_in_memory_is_a_note(text, trained, tmp_path, monkeypatch):
    errors = {4: UserError("too large a cache"), 8: JaxRuntimeError("RESOURCE_EXHAUSTED: 1 GiB")}
    errors[12] = MemoryError()
    left = list(errors.values())

    def write_sample(run, weights):
        raise left.pop(0)

    monkeypatch.setattr(language_model, "write_sample", write_sample)
    flags = ["--sample-every", "4", "--keep", "3"]
    done = call("train", *TINY, *flags, "--data", text, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    for step, error in errors.items():
        assert f"note: no sample at step {step}: {error}\n" in done.err
    assert "--- sample ---" not in done.err and "Traceback" not in done.err
    assert checkpoint.steps(tmp_path / "run") == [4, 8, 12]
    assert read_lines(tmp_path / "run") == read_lines(trained[1])


def test_a_sample_that_crashes_does_not_cost_the_checkpoint_of_its_step(
    text, tmp_path, monkeypatch
):
    def write_sample(run, weights):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(language_model, "write_sample", write_sample)
    argv = [*TINY, "--sample-every", "4", "--data", text, "--out", tmp_path / "run"]
    with pytest.raises(ZeroDivisionError):
        call("train", *argv)
    assert checkpoint.steps(tmp_path / "run") == [4]
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [1, 2, 3, 4, 4]


def test_a_profile_is_a_trace_of_the_steps_asked_for(text, finished):
    """Of a run that was stopped after step 8, too: step 12 of those that are left."""
    run = finished
    shutil.rmtree(run / "checkpoints" / "12")
    done = call("train", *TINY, "--data", text, "--out", run, "--profile", "1")
    assert done.code == 0, done.err
    assert f"profile        steps 12 to 12: xprof {run / 'profile'}" in done.err
    (xplane,) = run.glob("profile/plugins/profile/*/*.xplane.pb")
    (trace,) = run.glob("profile/plugins/profile/*/*.trace.json.gz")
    assert xplane.stat().st_size > 1000
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("train_step" in str(event.get("name")) for event in events)
    (run / "profile" / "notes.txt").write_text("mine")
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events.out.tfevents.1").write_text("a run's")
    run_dir.remove_run(run)
    assert snapshot(run) == {"checkpoints": None, "profile": None, "profile/notes.txt": b"mine"}


def test_tensorboard_is_told_what_metrics_jsonl_holds(text, tmp_path, monkeypatch):
    found = {}
    board = SimpleNamespace(
        add_scalar=lambda name, value, step: found.update({(step, name): value}), close=lambda: None
    )
    writer = SimpleNamespace(SummaryWriter=lambda folder, purge_step: board, __spec__="planted")
    monkeypatch.setitem(sys.modules, "tensorboardX", writer)
    run = tmp_path / "run"
    done = call("train", *TINY, "--data", text, "--out", run, "--tensorboard")
    assert done.code == 0, done.err
    lines = read_lines(run)
    expected = {(x["step"], k): v for x in lines for k, v in x.items() if k != "step"}
    assert expected.items() <= found.items()


def test_what_the_output_needs_is_refused_where_it_is_missing(text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flags, words in (
        (["--tensorboard"], "pip install 'gpt-jax[tensorboard]'"),
        (["--profile", "10"], "the run has 12 steps"),
    ):
        done = call("train", *TINY, "--data", text, "--out", tmp_path / "run", *flags)
        assert done.code == 2 and words in done.err and done.err.count("error: ") == 1
    assert snapshot(tmp_path) == {}
