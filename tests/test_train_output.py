"""What a run shows while it trains, which changes nothing: samples, speed, TensorBoard, traces."""

import gzip
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from programs import TINY, arrays, call, read_lines, refuse, same_bits, snapshot, succeed

from gpt import checkpoint
from gpt.errors import UserError
from gpt.evaluate import in_training
from gpt.training import run_dir


def test_evaluation_and_samples_shift_neither_data_nor_noise(text, trained, tmp_path):
    """Without any, and with dropout: the same losses and the same weights, to the bit."""
    flags = ["--eval-every", "100", "--sample-every", "0", "--keep-best", "0"]
    succeed("train", *TINY, *flags, "--data", text, "--out", tmp_path / "run")
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

    monkeypatch.setattr(in_training, "write_sample", write_sample)
    flags = ["--sample-every", "4", "--keep", "3"]
    done = succeed("train", *TINY, *flags, "--data", text, "--out", tmp_path / "run")
    for step, error in errors.items():
        assert f"note: no sample at step {step}: {error}\n" in done.err
    assert "--- sample ---" not in done.err and "Traceback" not in done.err
    assert checkpoint.saved_steps(tmp_path / "run") == [4, 8, 12]
    assert read_lines(tmp_path / "run") == read_lines(trained[1])


def test_a_sample_that_crashes_does_not_cost_the_checkpoint_of_its_step(
    text, tmp_path, monkeypatch
):
    def write_sample(run, weights):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(in_training, "write_sample", write_sample)
    argv = [*TINY, "--sample-every", "4", "--data", text, "--out", tmp_path / "run"]
    with pytest.raises(ZeroDivisionError):
        call("train", *argv)
    assert checkpoint.saved_steps(tmp_path / "run") == [4]
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [1, 2, 3, 4, 4]


def test_a_profile_is_a_trace_of_the_steps_asked_for(text, finished):
    """Of a run that was stopped after step 8, too: step 12 of those that are left."""
    run = finished
    shutil.rmtree(run / "checkpoints" / "12")
    done = succeed("train", *TINY, "--data", text, "--out", run, "--profile", "1")
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


def planted(name, found, broken=False):
    """A module in place of a tracker's package, which puts all that it gets into `found`."""

    def log(values, step):
        if broken:
            raise ConnectionError("the server is gone")
        found.update({(step, name): value for name, value in values.items()})

    def init(project=None, *, config, **about):
        found.update(config)
        found["id"] = about.get("id") or about["name"].removeprefix("run-")

    board = SimpleNamespace(
        add_scalar=lambda name, value, step: log({name: value}, step),
        add_text=lambda name, text, step: log({name: text}, step),
        close=lambda: None,
    )
    return SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: board,
        init=init,
        log=log,
        finish=lambda: found.update(closed=True),
        Html=lambda text: text,
        Settings=dict,
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(project=None)),
        __spec__="planted",
    )


def test_trackers_are_told_what_metrics_jsonl_holds_and_stop_no_run(text, tmp_path, monkeypatch):
    found = {name: {} for name in ("tensorboardX", "wandb", "trackio")}
    for name, values in found.items():
        monkeypatch.setitem(sys.modules, name, planted(name, values))
    run = tmp_path / "run"
    argv = [*TINY, "--data", text, "--log-to", "tensorboard", "wandb", "trackio"]
    done = succeed("train", *argv, "--out", run)
    expected = {(x["step"], k): v for x in read_lines(run) for k, v in x.items() if k != "step"}
    for values in found.values():
        assert expected.items() <= values.items()
        assert values[7, "sample"].startswith("<pre>")
    assert found["wandb"]["learning_rate"] == 1e-3 and found["trackio"]["model.d_model"] == 16
    assert found["wandb"]["id"] == found["trackio"]["id"] == (run / "tracking-id").read_text()
    assert found["wandb"]["closed"]

    broken = dict.fromkeys(found, None)
    for name in broken:
        monkeypatch.setitem(sys.modules, name, planted(name, {}, broken=True))
    done = call("train", *argv, "--out", tmp_path / "other")
    assert done.code == 0
    assert done.err.count("(the server is gone); metrics.jsonl has everything") == 3
    assert read_lines(tmp_path / "other") == read_lines(run)


def test_what_the_output_needs_is_refused_where_it_is_missing(text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flags, words in (
        (["--log-to", "tensorboard"], "pip install -e '.[tensorboard]'"),
        (["--log-to", "wandb", "trackio"], "--log-to wandb needs wandb, which is not installed"),
        (["--profile", "10"], "the run has 12 steps"),
    ):
        refuse(words, "train", *TINY, "--data", text, "--out", tmp_path / "run", *flags)
    assert snapshot(tmp_path) == {}
