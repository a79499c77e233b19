"""train.py: what a run leaves, where it starts, that it continues to the bit, what it refuses."""

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from programs import (
    EVERY,
    ROOT,
    SHAPE,
    STEPS,
    TIMINGS,
    TINY,
    arrays,
    bits,
    call,
    read_lines,
    refuse,
    same_bits,
    snapshot,
    stored_shapes,
    succeed,
    write_text,
)

from gpt import checkpoint, cli, train_flags
from gpt.config import MeshConfig, TrainConfig, from_json, to_json
from gpt.data import tokenizers
from gpt.errors import UserError
from gpt.presets import PRESETS
from gpt.sampling.language_model import load
from gpt.training import auto_settings, resume, run_plan, step_functions, train_state
from gpt.training.metrics import read_metrics

# What a run leaves.


def test_a_run_leaves_what_the_next_command_needs(trained):
    done, folder = trained
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints", "metrics.jsonl", "samples.jsonl", "tokenizer.json", "loss.png"
    }  # fmt: skip
    assert checkpoint.saved_steps(folder) == [8, 12]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert tokenizers.load(folder / "tokenizer.json").name == "byte"
    assert cli.command("sample.py", str(folder), "--prompt", "TEXT") + "\n" in done.err
    assert done.err.count("--- sample ---") == 2  # after step 7, and at the end
    assert done.out == ""
    losses = [line["loss"] for line in read_lines(folder) if "loss" in line]
    assert losses[-1] < losses[0] - 0.1


def test_metrics_have_the_fields_that_others_read(trained):
    lines = read_metrics(trained[1] / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "val_loss" in line]
    fields = {"step", "loss", "learning_rate", "grad_norm", "tokens", *TIMINGS}
    assert all(fields <= line.keys() and 0 < line["mfu"] < 1 for line in training)
    assert all({"step", "val_loss", "val_bits_per_byte"} <= line.keys() for line in evaluation)
    assert [line["step"] for line in training] == list(range(1, 13))
    assert [line["step"] for line in evaluation] == [4, 5, 8, 10, 12]  # and at saves
    assert [line["tokens"] for line in training] == list(range(64, 12 * 64 + 1, 64))
    # A byte tokenizer without end-of-text inside: a token is a byte, and a bit is log 2 nats.
    for line in evaluation:
        assert line["val_bits_per_byte"] == pytest.approx(line["val_loss"] / np.log(2), rel=1e-6)


def test_a_dry_run_prints_the_plan_and_writes_nothing(text, trained, tmp_path, monkeypatch):
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(
        argument_size_in_bytes=2**20, output_size_in_bytes=0, alias_size_in_bytes=0,
        temp_size_in_bytes=2**20,
    ))  # fmt: skip
    monkeypatch.setattr(run_plan, "compile_train_step", lambda config, mesh: compiled)
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.chdir(here)
    done = call("train", *TINY, "--data", text, "--dry-run", "--out", here / "deep" / "run")
    assert done.code == 0
    for words in ("parameters", "optimizer", "4 x 16 = 64 tokens per step", "2 micro-batches,"):
        assert words in done.err
    assert "12 steps" in done.err and "2.1 MB on each device" in done.err
    assert f"the run would be in {here}/deep/run\n" in done.err
    assert snapshot(tmp_path) == {"here": None}


# Continuing.


def test_a_crashed_run_continues_to_the_bit(text, trained, tmp_path, before_step):
    """From the checkpoint of step 8; the lines of 9 and 10 are written anew."""

    def crash(step, state):
        if step == 11:
            raise RuntimeError("the power went")

    argv = [*TINY, "--data", text, "--out", tmp_path / "run"]
    before_step(crash)
    with pytest.raises(RuntimeError, match="the power went"):
        call("train", *argv)
    assert checkpoint.saved_steps(tmp_path / "run") == [4, 8]
    assert read_lines(tmp_path / "run")[-1]["step"] > 8
    before_step(lambda *_: None)
    succeed("train", *argv)
    assert same_bits(arrays(tmp_path / "run", 12), arrays(trained[1], 12))
    assert read_lines(tmp_path / "run") == read_lines(trained[1])


def test_a_real_process_saves_before_it_leaves(text, tmp_path):
    argv = [*SHAPE, "--steps", "1000000", "--log-every", "1", "--data", text, "--out", tmp_path]
    argv += ["--save-every", "1000000", "--eval-every", "1000000", "--sample-every", "0"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, argv)], stderr=subprocess.PIPE, text=True
    )
    try:
        metrics, waited = tmp_path / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < waited
            time.sleep(0.05)
        process.terminate()
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in err
    (saved,) = checkpoint.saved_steps(tmp_path)
    assert read_lines(tmp_path)[-1]["step"] == saved > 0


def test_a_run_is_resumed_by_its_folder_alone(trained, finished, monkeypatch):
    """Settings and text are its own; what changes no result may be changed."""
    asked = []
    monkeypatch.setattr(cli, "make_deterministic", lambda: asked.append(True))
    shutil.rmtree(checkpoint.step_dir(finished, 12))
    changed = ["--log-every", "2", "--mesh.fsdp", "1", "--deterministic"]
    done = succeed("train", "--resume", finished, *changed)
    assert "continues      from step 8" in done.err
    assert "the same in every run without this flag" in done.err
    assert same_bits(arrays(finished, 12), arrays(trained[1], 12))
    assert read_lines(finished)[-1] == read_lines(trained[1])[-1]
    assert checkpoint.read_metadata(finished, 12)["model"]["compute_dtype"] is None  # still open
    succeed("train", "--resume", finished, "--extend", "1")
    assert asked == [True, True]  # the second time as it was saved


def test_what_a_run_does_beside_training_is_resumed_too(finished, monkeypatch):
    honest = checkpoint.read_metadata
    flags = {"log_to": ["trackio"], "eval_tasks": "mine", "eval_tasks_path": str(finished)}

    def read_metadata(folder, step):
        about = honest(folder, step)
        return about | {"flags": about["flags"] | flags}

    monkeypatch.setattr(checkpoint, "read_metadata", read_metadata)
    argv = ["--resume", str(finished), "--eval-tasks", "other"]
    args = train_flags.parse_args(argv, "")
    args = resume.with_settings_of_run(args, cli.flags_given(argv))
    assert list(args.log_to) == ["trackio"] and args.eval_tasks_path == finished
    assert args.eval_tasks == "other" and args.eval_tasks_every == 1000


def test_a_finished_run_is_extended_where_its_schedule_ended(text, finished):
    before = read_lines(finished)
    done = succeed("train", "--resume", finished, "--extend", "3")
    assert "by 3 steps, trained at the schedule's last learning rate, 0.0001" in done.err
    lines = read_lines(finished)
    assert lines[: len(before)] == before
    added = [line for line in lines if line["step"] > 12 and "loss" in line]
    assert [line["step"] for line in added] == [13, 14, 15]
    assert {line["learning_rate"] for line in added} == {before[-2]["learning_rate"]}
    for same in (["--resume", finished], [*TINY, "--data", text, "--out", finished]):
        again = call("train", *same)
        assert "complete       15 steps (the last 3 of them by --extend); " in again.err
    fifteen = [*TINY, "--steps", "15", "--out", finished]
    for words, *flags in (
        ("--extend 12 for steps after its schedule", *TINY, "--steps", "27", "--out", finished),
        ("drop the preset gpt2", "gpt2", "--resume", finished),
        ("--resume and --out cannot be combined", "--resume", finished, "--out", finished),
        ("--extend adds steps", "--extend", "3"),
        ("--extend and --steps", "--resume", finished, "--extend", "3", "--steps", "20"),
        ("steps: the run has 15 steps (the last 3 of them by --extend), you asked", *fifteen),
        ("no folder", "--resume", text.parent / "gone"),
        ("batch_size: the run has 4, you asked for 8", "--resume", finished, "--batch-size", "8"),
    ):
        refuse(words, "train", *flags, "--data", text)


def test_the_same_command_on_a_finished_run(text, finished):
    """The picture is made again: the process may have been killed at the very end."""
    before = snapshot(finished)
    (finished / "loss.png").unlink()
    done = call("train", *TINY, "--data", text, "--out", finished)
    assert done.code == 0 and "complete" in done.err and "sample it" in done.err
    assert snapshot(finished) == before and "best validation" not in done.err

    # Had it been better before, it would say so.
    with (finished / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 8, "val_loss": 1.5}\n')
    done = call("train", *TINY, "--data", text, "--out", finished)
    assert "step 8 has the best validation loss, 1.5000: add --step 8 to sample.py" in done.err


def test_minutes_settle_the_steps_and_the_schedule(text, tmp_path, monkeypatch):
    """With a second for each step."""
    clock = itertools.count()
    monkeypatch.setattr(auto_settings, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    argv = [*SHAPE, *EVERY, "--minutes", "0.19", "--eval-tokens", "192", "--data", text]
    argv += ["--out", tmp_path / "run"]
    done = succeed("train", *argv)
    assert "as many steps as fit in about 0.19 min, not counting reading the text" in done.err
    assert "settled        9 steps, the first 0 to warm up: a step takes 1,000 ms" in done.err
    lines = [line for line in read_lines(tmp_path / "run") if "loss" in line]
    assert len(lines) == 9 and lines[-1]["learning_rate"] == pytest.approx(3e-4)
    whole = arrays(tmp_path / "run", 9)
    shutil.rmtree(checkpoint.step_dir(tmp_path / "run", 9))
    done = call("train", *argv)
    assert done.code == 0 and "continues      from step 8" in done.err
    assert "settled" not in done.err and same_bits(arrays(tmp_path / "run", 9), whole)
    for flags in (["--steps", "3", "--minutes", "1"], ["--resume", "run", "--minutes", "1"]):
        assert call("train", *flags).code == 2


def test_changed_settings_are_refused_with_the_differences(text, finished):
    before = snapshot(finished)
    changed = ["--learning-rate", "2e-3", "--tokenizer", "char", "--seq-len", "8"]
    done = call("train", *TINY, *changed, "--data", text, "--out", finished)
    assert done.code == 2
    (_, error) = done.err.split("error: ")
    assert error.startswith(f"{finished} holds a run that these settings would change:\n")
    assert "\n  learning_rate: the run has 0.001, you asked for 0.002\n" in error
    assert "\n  tokenizer: the run has byte, you asked for char\n" in error
    assert "\n  model.context_length: the run has 16, you asked for 8\n" in error
    assert error.count("\n  ") == 3 and "--overwrite" in error and "--init-from" in error
    assert snapshot(finished) == before


def test_only_what_changes_no_result_may_differ(trained):
    about = checkpoint.read_metadata(trained[1], 12)
    config = from_json(TrainConfig, about["train"])
    replace = dataclasses.replace
    may = replace(config, log_every=3, grad_accum=1, mesh=MeshConfig(fsdp=2))
    assert resume.differences(about["train"], may, 12) == []
    # Other tokens of an evaluation have another loss, by which the best checkpoint is chosen.
    for name, value in {"steps": 24, "batch_size": 8, "eval_tokens": 64, "seed": 7}.items():
        (line,) = resume.differences(about["train"], replace(config, **{name: value}), 12)
        assert line.startswith(f"{name}: the run has ")

    # Nor does the number of steps matter to wsd, if the warm-up is whole and nothing falls yet.
    for warmup, n_lines in ((10, 0), (11, 1)):
        wsd = replace(config, schedule="wsd", warmup_steps=warmup)
        assert len(resume.differences(to_json(wsd), replace(wsd, steps=24), 9)) == n_lines

    # A setting that the run is older than had its default.
    del about["train"]["clip_norm"], about["train"]["model"]["n_kv_heads"]
    assert resume.differences(about["train"], config, 12) == []
    changed = resume.differences(about["train"], replace(config, clip_norm=0.5), 12)
    assert changed == ["clip_norm: the run has 1.0, you asked for 0.5"]


def test_overwrite_starts_afresh_and_removes_only_what_a_run_wrote(text, finished, before_step):
    for place in (finished, finished / "checkpoints"):
        (place / "notes.txt").write_text("mine")
    before_step(lambda step, _: step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    done = call("train", *TINY, "--data", text, "--out", finished, "--overwrite")
    assert done.code == 143, done.err
    assert checkpoint.saved_steps(finished) == [3]
    assert [x["step"] for x in read_lines(finished)] == [1, 2, 3]
    for place in (finished, finished / "checkpoints"):
        assert (place / "notes.txt").read_text() == "mine"


def test_overwrite_removes_nothing_when_it_is_refused(text, finished, tmp_path, monkeypatch):
    """Neither by what is asked for, nor by a step that turns out not to fit."""

    def compile_steps(config, mesh):
        raise UserError("out of memory: a step takes 2 GiB")

    monkeypatch.setattr(step_functions, "compile_steps", compile_steps)
    before = snapshot(tmp_path)
    for words, *more in (
        ("--seq-len 100000", "--data", text, "--seq-len", "100000"),
        ("missing does not exist", "--data", tmp_path / "missing"),
        ("out of memory", "--data", text),
    ):
        for out in (finished, tmp_path / "new"):
            refuse(words, "train", *TINY, "--out", out, "--overwrite", *more)
            assert snapshot(tmp_path) == before


# Proving that it continues.


@pytest.fixture
def verify(text, tmp_path, monkeypatch):
    """The flags that prove it, in a world where what is left behind is seen."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return [*TINY, "--ema-decay", "0.9", "--data", text, "--verify-resume", "--out"]


def test_a_stopped_run_is_proven_to_equal_one_that_is_not(verify, trained, tmp_path):
    """Beside a run that is there, which is left alone."""
    before = snapshot(trained[1])
    done = succeed("train", *verify, trained[1])
    compared = [line for line in done.err.splitlines() if line.startswith("compared")]
    assert all(line.endswith("equal bit for bit") for line in compared)
    parts = [line.removeprefix("compared").strip().split(",")[0] for line in compared]
    assert parts == ["weights", "optimizer and step", "average", "metrics"]
    assert "metrics, 8 lines" in compared[-1]
    assert "grad_norm" in compared[-1] and "val_loss" in compared[-1]
    assert "verified       3 steps, a stop and 3 more equal 6 without a stop" in done.err
    assert snapshot(tmp_path) == {} and snapshot(trained[1]) == before


def test_what_a_stop_loses_is_noticed(verify, tmp_path, monkeypatch):
    """As if the second moments were not saved, or the noise came from a stream of its own."""
    honest = train_state.load_state

    def forgetful(like, folder, at):
        loaded = honest(like, folder, at)
        forget = lambda a: a * np.float32(1 + 1e-6) if a.ndim else a  # noqa: E731
        return dataclasses.replace(loaded, opt_state=jax.tree.map(forget, loaded.opt_state))

    monkeypatch.setattr(train_state, "load_state", forgetful)
    done = call("train", *verify, tmp_path / "run")
    assert done.code == 1
    assert "NOT verified" in done.err and "differs, " in done.err and "Traceback" not in done.err
    assert snapshot(tmp_path) == {}


# The average, and weights of another run.


def test_the_average_is_what_is_sampled(text, trained, tmp_path):
    run = tmp_path / "run"
    flags = ["--ema-decay", "0.9", "--sample-every", "0", "--eval-every", "100"]
    succeed("train", *TINY, *flags, "--data", text, "--out", run)
    averaged, last = load(run), load(run, weights="raw")
    assert averaged.weights == "ema" and last.weights == "raw"
    stored = checkpoint.restore(run, 12, "ema_params", stored_shapes(run, 12, "ema_params"))
    assert np.array_equal(averaged.params["tokens"], stored["tokens"])
    assert not np.array_equal(averaged.params["tokens"], last.params["tokens"])
    for flags, said in (([], True), (["--weights", "raw"], False)):
        done = call("sample", run, "--prompt", "the", "--max-new-tokens", "3", *flags)
        assert ("averaged weights" in done.err) == said
    refuse("has no averaged weights", "sample", trained[1], "--weights", "ema")


def test_a_run_takes_weights_tokenizer_and_model_of_another(trained, tmp_path, monkeypatch):
    """Text in another file, and a tokenizer of its own, which is not used."""
    kept = []

    def initial_state(*args):
        state = honest(*args)
        kept.append(jax.tree.map(np.array, state))  # the first step consumes it
        return state

    honest = resume.initial_state
    monkeypatch.setattr(resume, "initial_state", initial_state)
    argv = ["--data", write_text(tmp_path / "t", seed=2), "--out", tmp_path / "run"]
    argv += ["--tokenizer", "char"]
    settings = ["--batch-size", "4", "--grad-accum", "2", *STEPS[:4], *STEPS[6:], *EVERY]
    done = succeed("train", *settings, *argv, "--init-from", trained[1])
    weights = checkpoint.restore(trained[1], 12, "params", stored_shapes(trained[1], 12, "params"))
    assert bits(kept[0].params) == bits(weights) and kept[0].step == 0
    source = checkpoint.read_metadata(trained[1], 12)
    began = checkpoint.read_metadata(tmp_path / "run", 12)
    assert began["model"] == source["model"]
    assert tokenizers.load(tmp_path / "run" / "tokenizer.json").name == "byte"
    assert began["init_from"] == str(trained[1])

    # Continued without --init-from, by a command that gives the model itself.
    shutil.rmtree(checkpoint.step_dir(tmp_path / "run", 12))
    done = call("train", *TINY, *argv)
    assert done.code == 0 and "continues" in done.err, done.err
    assert checkpoint.read_metadata(tmp_path / "run", 12)["init_from"] == str(trained[1])


def test_model_flags_win_over_the_other_run_even_with_the_value_of_the_preset(trained, tmp_path):
    """The other run has 2 layers of width 16, 2 heads, a dropout of 0.1, and a context of 16."""
    preset = PRESETS["tiny"].model
    flags = ["--model.dropout", str(preset.dropout), f"--model.n_heads={preset.n_heads}"]
    argv = [*flags, "--model.no-bias", "--init-from", str(trained[1])]
    args = train_flags.parse_args(argv, "")
    args = resume.with_model_of_source(args, tmp_path / "run", cli.flags_given(argv))
    model = args.config.model
    assert (preset.dropout, preset.n_heads) != (0.1, 2)  # else this shows nothing
    assert (model.dropout, model.n_heads, model.bias) == (preset.dropout, preset.n_heads, False)
    assert (model.n_layers, model.d_model, model.context_length) == (2, 16, 16)
    assert model.compute_dtype == preset.compute_dtype
