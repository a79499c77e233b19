"""Which weight is updated how, and how fast."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt.config import ModelConfig, TrainConfig
from gpt.model import transformer
from gpt.training import optimizer, step_functions, train_state

MODEL = ModelConfig(
    100, context_length=16, n_layers=3, n_heads=4, n_kv_heads=2, d_model=32,
    mlp="swiglu", qk_norm=True, tied=False,
)  # fmt: skip
CONFIG = TrainConfig(model=MODEL, batch_size=4, steps=100, warmup_steps=10, optimizer="muon")


def rates(config):
    return [float(optimizer.make_schedule(config)(i)) for i in range(config.steps)]


def test_every_parameter_has_its_group():
    """Norms, biases, embeddings and the head go to AdamW; each block's matrices to Muon."""
    found = jax.tree_util.tree_leaves_with_path(optimizer.groups(transformer.abstract(MODEL)))
    by_name = {jax.tree_util.keystr(p, simple=True, separator="/"): group for p, group in found}
    matrices = {f"blocks/attention/{name}/kernel" for name in "qkvo"}
    matrices |= {f"blocks/mlp/{name}/kernel" for name in ("up", "gate", "down")}
    assert {name for name, group in by_name.items() if group == "muon"} == matrices
    assert set(by_name.values()) == {"muon", "adamw"}


def linear(name, kernel):
    return {name: {"kernel": kernel}}


def test_stacked_matrices_are_updated_like_each_layer_alone():
    params = transformer.init(MODEL, jax.random.key(0))
    noise = np.random.default_rng(0)
    grads = jax.tree.map(lambda a: jnp.asarray(noise.normal(0, 1, a.shape), a.dtype), params)
    muon = optimizer.make_muon(CONFIG)
    rounding = 3.4445**5 * 2**-24  # five Newton-Schulz steps multiply a small value by that much

    @jax.jit
    def update(weights, gradients):
        return muon.update(gradients, muon.init(weights), weights)[0]

    for room, name in [("attention", n) for n in "qkvo"] + [("mlp", "up"), ("mlp", "down")]:
        weight, gradient = (tree["blocks"][room][name]["kernel"] for tree in (params, grads))
        stacked = update(linear(name, weight), linear(name, gradient))[name]["kernel"]
        for layer in range(MODEL.n_layers):
            one = update(linear(name, weight[layer]), linear(name, gradient[layer]))
            alone = one[name]["kernel"]
            assert np.abs(stacked[layer] - alone).max() < rounding * np.abs(alone).max()


def test_muon_makes_updates_orthogonal():
    """All singular values of an update near one another, as a whole projection D x (N H)."""
    weight = jnp.zeros((32, 4, 8))
    gradient = jnp.asarray(np.random.default_rng(1).normal(0, 1, weight.shape), jnp.float32)
    config = dataclasses.replace(CONFIG, warmup_steps=0, weight_decay=0.0, muon_learning_rate=1.0)
    muon = optimizer.make_muon(config)
    weights = linear("q", weight)
    updates, _ = muon.update(linear("q", gradient), muon.init(weights), weights)
    update = updates["q"]["kernel"]
    values = np.linalg.svd(np.asarray(update).reshape(32, 32), compute_uv=False)
    raw = np.linalg.svd(np.asarray(gradient).reshape(32, 32), compute_uv=False)
    assert values.max() / values.min() < 3 < raw.max() / raw.min()


def test_schedules_rise_and_fall_as_named():
    cosine, linear, wsd = (
        rates(dataclasses.replace(CONFIG, schedule=name)) for name in ("cosine", "linear", "wsd")
    )
    for curve in (cosine, linear, wsd):
        assert 0 < curve[0] < curve[5] < curve[10] == pytest.approx(1e-3)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(curve[10:]))
    middle = (1e-3 + 1e-4) / 2
    assert (cosine[54] + cosine[55]) / 2 == pytest.approx(middle)
    assert (linear[54] + linear[55]) / 2 == pytest.approx(middle)
    assert cosine[30] > linear[30]
    assert wsd[10:80] == pytest.approx([1e-3] * 70) and wsd[80] < 1e-3
    assert wsd[89] == pytest.approx(middle)
    # A longer run may continue a shorter one until it falls.
    longer = rates(dataclasses.replace(CONFIG, schedule="wsd", steps=200))
    assert wsd[:80] == longer[:80]


@pytest.mark.parametrize("warmup", [0, 1, 10, 11, 100])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_minimum_whatever_the_warmup(schedule, warmup):
    for steps in (2, 3, 12):
        config = dataclasses.replace(
            CONFIG, schedule=schedule, steps=steps, warmup_steps=warmup, min_learning_rate=1e-4
        )
        curve = rates(config)
        assert curve[-1] == pytest.approx(1e-4) and max(curve) == pytest.approx(1e-3)


def test_decay_pulls_matrices_alone_and_by_the_rate():
    """With zero gradients the only update is decay: -rate x decay x weight, biases untouched."""
    params = jax.tree.map(lambda a: a + 1.0, transformer.init(MODEL, jax.random.key(0)))
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = dataclasses.replace(CONFIG, optimizer="adamw", weight_decay=0.5, warmup_steps=0)
    tx = optimizer.make_optimizer(config)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for (path, update), weight in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        decays = path[-1].key not in ("bias", "scale")
        assert np.allclose(update, -1e-3 * 0.5 * weight if decays else 0, atol=1e-9), path


@pytest.mark.parametrize(("clip_norm", "longest"), [(1.0, 1), (0.0, np.inf)])
def test_adamw_is_that_of_the_textbook(clip_norm, longest):
    """Clipping, then both moments, decoupled decay and the rate of each step, in NumPy."""
    config = dataclasses.replace(
        CONFIG, optimizer="adamw", beta1=0.8, beta2=0.95, weight_decay=0.1, clip_norm=clip_norm
    )
    rate, noise = rates(config), np.random.default_rng(0)
    weight, first, second = np.ones((3, 2)), 0, 0
    adamw = optimizer.make_optimizer(config)
    state = adamw.init({"kernel": weight})
    for n in range(3):
        gradient = noise.normal(0, n + 1, weight.shape)
        updates, state = adamw.update({"kernel": gradient}, state, {"kernel": weight})
        norm = np.linalg.norm(gradient)
        clipped = gradient * min(norm, longest) / norm
        first = 0.8 * first + 0.2 * clipped
        second = 0.95 * second + 0.05 * clipped**2
        unbiased = first / (1 - 0.8 ** (n + 1)), second / (1 - 0.95 ** (n + 1))
        expected = -rate[n] * (unbiased[0] / np.sqrt(unbiased[1]) + 0.1 * weight)
        assert np.allclose(updates["kernel"], expected, rtol=1e-5)
        weight = weight + expected


def test_average_lags_behind_and_starts_quickly():
    config = dataclasses.replace(CONFIG, ema_decay=0.99)
    old, new = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    at = lambda n: float(step_functions.update_ema(config, old, new, jnp.int32(n))["w"][0])  # noqa: E731
    assert at(0) == 1.0  # the first step's weights are the average
    assert at(9) == pytest.approx(0.5)
    assert at(10**6) == pytest.approx(0.01, rel=1e-4)
    state = train_state.fresh_state(config)
    assert optax.tree.norm(state.ema_params) == optax.tree.norm(state.params)
    assert train_state.fresh_state(CONFIG).ema_params == {}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_of_bfloat16_weights_are_float32(name):
    """In bfloat16 what a step adds to a moving average would round away; weights keep their type,
    and the moments are those of float32 gradients."""
    config = dataclasses.replace(CONFIG, optimizer=name)
    params = transformer.init(MODEL, jax.random.key(0))
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    tx = optimizer.make_optimizer(config)
    state = tx.init(narrow)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.dtype == jnp.float32 for x in floats)
    update = jax.jit(tx.update)
    updates, after = update(narrow, state, narrow)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    _, exact = update(wide, tx.init(wide), wide)
    assert all(map(np.array_equal, jax.tree.leaves(after), jax.tree.leaves(exact)))
    trained = optax.apply_updates(narrow, updates)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(trained))
