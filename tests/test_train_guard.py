"""train.py with a NaN at a known step and layer: skipped, counted, reported, stopped."""

import os
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest
from programs import TINY, arrays, call, read_lines, same_bits

from gpt import checkpoint
from gpt.training import train_step
from gpt.training.trainer import Recorder

RUN = [*TINY, "--eval-every", "100", "--sample-every", "0", "--ema-decay", "0.9"]
AT, LAYER = 7, 1


@pytest.fixture
def plant(monkeypatch):
    """Have the weights of a layer be bad in some steps, and good again after them; a list of the
    steps that were made."""
    honest, made = train_step.compile_steps, []

    def in_steps(bad):
        def compile_steps(config, mesh):
            train_step, eval_step = honest(config, mesh)

            def watched(state, tokens):
                step = int(state.step) + 1
                made.append(step)
                up = state.params["blocks"]["mlp"]["up"]
                good = jnp.copy(up["kernel"][LAYER])
                if step in bad:
                    up["kernel"] = up["kernel"].at[LAYER, 0].set(jnp.nan)
                state, metrics = train_step(state, tokens)
                if step in bad and step != max(bad):
                    up = state.params["blocks"]["mlp"]["up"]
                    up["kernel"] = up["kernel"].at[LAYER].set(good)
                return jax.block_until_ready(state), metrics

            return watched, eval_step

        monkeypatch.setattr(train_step, "compile_steps", compile_steps)
        return made

    return in_steps


def test_a_planted_nan_is_reported_with_its_step_and_layer(text, tmp_path, plant):
    """Three in a row are one too many: exit code 1, one line, the checkpoint before them whole."""
    made = plant({AT, AT + 1, AT + 2})
    run = tmp_path / "run"
    done = call("train", *RUN, "--max-bad-steps", "3", "--data", text, "--out", run)
    assert done.code == 1
    assert made == list(range(1, AT + 3))  # no step more: the weights are those of the last
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert f"error: step {AT}: " in error and "3 step(s) in a row; " in error
    assert f"in the weights of block {LAYER} of 0 to 1 (blocks/mlp/up/kernel)" in error
    assert "the last good checkpoint is step 4" in error
    assert checkpoint.steps(run) == [4] and "step 8 is not saved" in done.err
    lines = [line for line in read_lines(run) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0] * (AT - 1) + [1, 2, 3]
    assert [line["loss"] is None for line in lines] == [False] * (AT - 1) + [True] * 3
    assert "Traceback" not in done.err


def test_a_few_bad_steps_are_skipped_and_shown(text, tmp_path, plant):
    """The run goes on with the next data; where it stops and continues, it ends the same."""
    run = tmp_path / "run"
    plant({AT, 20})
    done = call("train", *RUN, "--data", text, "--out", run)
    assert done.code == 0, done.err
    lines = [line for line in read_lines(run) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0] * (AT - 1) + [1] * (13 - AT)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert "  1 skipped" in done.err
    rates = [line["learning_rate"] for line in lines]
    assert rates[AT - 1] == rates[AT]  # it waits with the moments
    weights = arrays(run, 12)
    shutil.rmtree(checkpoint.step_dir(run, 12))
    done = call("train", *RUN, "--data", text, "--out", run)
    assert done.code == 0 and "continues      from step 8" in done.err
    assert [x["skipped"] for x in read_lines(run) if "loss" in x][8:] == [1] * 4
    assert same_bits(arrays(run, 12), weights)


def test_a_run_does_not_end_with_a_bad_step(text, tmp_path, plant):
    """No good one can follow it."""
    plant({12})
    done = call("train", *RUN, "--data", text, "--out", tmp_path)
    assert done.code == 1 and "error: step 12: " in done.err and "1 step(s) in a row" in done.err
    assert checkpoint.steps(tmp_path) == [4, 8]


def test_a_signal_at_a_skipped_step_waits_for_one_that_can_be_saved(
    text, tmp_path, plant, monkeypatch
):
    """A whole interval of steps would be lost otherwise."""
    plant({AT, 99})  # and made good again
    honest = Recorder.step

    def step(recorder, step, state, metrics):
        if step == AT:
            os.kill(os.getpid(), signal.SIGTERM)
        honest(recorder, step, state, metrics)

    monkeypatch.setattr(Recorder, "step", step)
    done = call("train", *RUN, "--save-every", "10", "--data", text, "--out", tmp_path)
    assert done.code == 143 and "not saved" not in done.err
    assert checkpoint.steps(tmp_path) == [AT + 1]
