"""What is no number changes nothing, and is found again: in which step, and in which layer.

First the step alone, then train.py with a NaN at a known step and layer.
"""

import dataclasses
import functools
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import TINY, arrays, bits, call, read_lines, same_bits, succeed

from gpt import checkpoint, flops, sharding
from gpt.config import MeshConfig, ModelConfig, TrainConfig
from gpt.model import layers
from gpt.training import memory_plan, step_functions, train_state
from gpt.training.nonfinite import locate_first_nonfinite
from gpt.training.recorder import Recorder

MODEL = ModelConfig(100, context_length=8, n_layers=4, n_heads=2, d_model=16, dropout=0.1)
CONFIG = TrainConfig(
    model=MODEL, batch_size=4, grad_accum=2, steps=20, warmup_steps=2, ema_decay=0.9
)


def batch(seed=0):
    return np.random.default_rng(seed).integers(100, size=(2, 2, 9)).astype(np.int32)


def change(array, place, value):
    """A copy of an array with one other value."""
    copy = np.array(array)
    copy[place] = value
    return copy


def planted(params, layer, value=np.nan, path=("blocks", "mlp", "up", "kernel")):
    """The weights with one bad value in one layer."""
    name, *rest = path
    if rest:
        return params | {name: planted(params[name], layer, value, rest)}
    return params | {name: change(params[name], layer, value)}


@functools.cache
def fresh(config):
    return jax.jit(train_state.fresh_state, static_argnums=0)(config)


@pytest.mark.parametrize("device", ["a CPU", "a GPU, with Muon"])
def test_a_bad_step_changes_only_the_number_of_steps(device, monkeypatch):
    """Weights, moments, momentum and average stay to the bit; the next good step is as if it had
    not been, but for its data and its noise."""
    config = CONFIG
    if device != "a CPU":
        config = dataclasses.replace(CONFIG, optimizer="muon")
        monkeypatch.setattr(step_functions.sharding, "platform", lambda: "gpu")
    run = jax.jit(step_functions.train_step, static_argnums=0)
    state, metrics = run(config, fresh(config), batch())
    assert metrics["skipped"] == 0 and int(state.step) == 1
    bad = dataclasses.replace(state, params=planted(state.params, 2))
    after, metrics = run(config, bad, batch(1))
    assert not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert (int(metrics["skipped"]), int(after.step)) == (1, 2)
    assert bits(after.params) == bits(bad.params)
    assert bits((after.opt_state, after.ema_params)) == bits((state.opt_state, state.ema_params))
    again = dataclasses.replace(after, params=state.params)
    late, metrics = run(config, again, batch(2))
    assert (int(metrics["skipped"]), int(late.step)) == (1, 3)
    assert step_functions.count_updates(late.opt_state) == 2
    assert bits(late.params) != bits(state.params)


def test_a_gradient_alone_is_enough(monkeypatch):
    """A loss that is finite, and an overflow on the way back."""
    honest = step_functions.loss_and_gradients
    run = jax.jit(step_functions.train_step, static_argnums=0)

    def gradients(*args):
        loss, grads = honest(*args)
        return loss, grads | {"tokens": grads["tokens"].at[3, 3].set(jnp.inf)}

    monkeypatch.setattr(step_functions, "loss_and_gradients", gradients)
    config = dataclasses.replace(CONFIG, seed=1)  # which is not compiled yet
    state = fresh(config)
    after, metrics = run(config, state, batch())
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert bits(after.params) == bits(state.params)


def test_the_guard_takes_no_memory(monkeypatch):
    """Neither a second copy of the weights nor of the moments; a choice would, on a CPU."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = dataclasses.replace(MODEL, vocab_size=5000)
    config = dataclasses.replace(CONFIG, model=model)
    guarded = memory_plan.need_of(step_functions.compile_train_step(config, mesh)).total
    monkeypatch.setattr(jax.lax, "cond", lambda good, update, keep, state: update(state))
    free = memory_plan.need_of(step_functions.compile_train_step(config, mesh)).total
    assert guarded < free + 10_000 < free + flops.weight_bytes(model) // 10


# Where it arose. One model for all: pre-norm with a head of its own.

LOCATED = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, tied=False))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, fresh(LOCATED).params)


def located(params, config=LOCATED) -> str:
    return locate_first_nonfinite(config, params, batch(), 5)


def test_a_bad_weight(params):
    for layer in (0, 3):
        assert located(planted(params, layer)) == (
            f"the first bad value is in the weights of block {layer} of 0 to 3 "
            "(blocks/mlp/up/kernel)"
        )
    for name in ("tokens", "positions"):
        both = planted(params, 2) | {name: change(params[name], 0, np.inf)}
        assert located(both).endswith(f"the weights of {name}")


def too_much_for_float32(params, layer):
    """Weights of a finite size, in the layer's attention, whose product is not."""
    params = planted(params, layer, 1e38, ("blocks", "attention", "v", "bias"))
    return planted(params, layer, 1e38, ("blocks", "attention", "o", "kernel"))


def test_a_bad_output(params):
    for layer in (0, 2, 3):
        said = located(too_much_for_float32(params, layer))
        assert said.endswith(f"the output of block {layer} of 0 to 3")
    huge = {name: params[name] + 3e38 for name in ("tokens", "positions")}
    assert located(params | huge).endswith("the output of the embedding")
    assert located(params | {"head": params["head"] + 3e38}).endswith("the output of the head")


def test_a_bad_gradient_is_met_on_the_way_back(params, monkeypatch):
    """An activation without a derivative where it is zero: the last block meets it first."""
    assert located(params).startswith("all values are finite")
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu_tanh", lambda x: jnp.sqrt(jnp.maximum(x, 0)) ** 2)
    config = dataclasses.replace(LOCATED, seed=2)  # which is not compiled yet
    assert "the gradient of block 3 of 0 to 3 (blocks/" in located(params, config)


# train.py with a NaN at a known step and layer: skipped, counted, reported, stopped.


RUN = [*TINY, "--eval-every", "100", "--sample-every", "0", "--ema-decay", "0.9"]
AT, LAYER = 7, 1


@pytest.fixture
def plant(before_step):
    """Have the weights of a layer be bad in some steps, and good again after them; a list of the
    steps that were made."""

    def in_steps(bad):
        made, good = [], []

        def spoil_or_heal(step, state):
            made.append(step)
            up = state.params["blocks"]["mlp"]["up"]
            if step in bad:
                good.append(up["kernel"])
                up["kernel"] = up["kernel"].at[LAYER, 0].set(jnp.nan)
            elif good:
                up["kernel"] = good[0]
                good.clear()

        before_step(spoil_or_heal)
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
    assert f"error: step {AT}: " in error and "3 steps in a row; " in error
    assert f"in the weights of block {LAYER} of 0 to 1 (blocks/mlp/up/kernel)" in error
    assert "the last good checkpoint is step 4" in error
    assert checkpoint.saved_steps(run) == [4] and "step 8 is not saved" in done.err
    lines = [line for line in read_lines(run) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0] * (AT - 1) + [1, 2, 3]
    assert [line["loss"] is None for line in lines] == [False] * (AT - 1) + [True] * 3
    assert "Traceback" not in done.err


def test_a_few_bad_steps_are_skipped_and_shown(text, tmp_path, plant):
    """The run goes on with the next data; where it stops and continues, it ends the same."""
    run = tmp_path / "run"
    plant({AT})
    done = succeed("train", *RUN, "--data", text, "--out", run)
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
    assert done.code == 1 and "error: step 12: " in done.err and "1 step in a row" in done.err
    assert checkpoint.saved_steps(tmp_path) == [4, 8]


def test_a_signal_at_a_skipped_step_waits_for_one_that_can_be_saved(
    text, tmp_path, plant, monkeypatch
):
    """A whole interval of steps would be lost otherwise."""
    plant({AT})
    honest = Recorder.note_step

    def step(recorder, step, state, metrics):
        if step == AT:
            os.kill(os.getpid(), signal.SIGTERM)
        honest(recorder, step, state, metrics)

    monkeypatch.setattr(Recorder, "note_step", step)
    done = call("train", *RUN, "--save-every", "10", "--data", text, "--out", tmp_path)
    assert done.code == 143 and "not saved" not in done.err
    assert checkpoint.saved_steps(tmp_path) == [AT + 1]
