"""One training step: loss, gradients, accumulation, donation, what learns and what decays."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt import sharding
from gpt.config import MeshConfig, ModelConfig, TrainConfig
from gpt.model import transformer
from gpt.training import loss, optimizer, train_state, train_step

MODEL = ModelConfig(300, context_length=16, n_layers=2, n_heads=2, d_model=32)
CONFIG = TrainConfig(model=MODEL, batch_size=8, steps=50, warmup_steps=5)


def batch(config, micro=1, seed=0, rows=8):
    T = config.model.context_length
    ids = np.random.default_rng(seed).integers(config.model.vocab_size, size=(rows, T + 1))
    return ids.astype(np.int32).reshape(micro, rows // micro, T + 1)


def start(config):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return train_state.make_state(config, mesh), *train_step.compile_steps(config, mesh)


def full_losses(config, params, tokens):
    """Cross-entropy from full logits, as the textbook has it."""
    logits = transformer.forward(config, params, tokens[:, :-1])
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize(
    ("rows", "kept", "parts"), [(64, 0, 1), (128, 0, 1), (128, 2**25, 1), (1000, 0, 1), (64, 0, 2)]
)
def test_chunked_loss_equals_full_loss_and_gradient(monkeypatch, rows, kept, parts):
    """Also where a chunk is put together of `parts` devices' rows."""
    monkeypatch.setattr(loss.sharding, "count_parts", lambda axis: parts)
    monkeypatch.setattr(loss, "CHUNK_ROWS", rows)  # 384 padded rows: 8, 4 and 1 chunks
    monkeypatch.setattr(loss, "KEPT_LOGITS", kept)
    params = transformer.init(MODEL, jax.random.key(0))
    tokens = jnp.asarray(batch(CONFIG)[0])
    mine = lambda p: loss.sequence_losses(MODEL, p, tokens)[0].mean()  # noqa: E731
    full = lambda p: full_losses(MODEL, p, tokens).mean()  # noqa: E731
    (a, ga), (b, gb) = (jax.jit(jax.value_and_grad(f))(params) for f in (mine, full))
    assert abs(a - b) < 1e-5
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        assert np.abs(x - y).max() < 1e-6


@pytest.mark.parametrize("kept", [0, 2**25])
def test_full_logits_never_exist_where_they_are_many(monkeypatch, kept):
    """No float32 array of [tokens, vocabulary] stands in the traced step of a GPT-2 vocabulary;
    where they are few, all chunks are kept side by side."""
    monkeypatch.setattr(loss, "KEPT_LOGITS", kept)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=50257))
    state = jax.eval_shape(lambda: train_state.fresh_state(config))
    jaxpr = str(
        jax.make_jaxpr(lambda s, t: train_step.train_step(config, s, t))(state, batch(config))
    )
    n_tokens = 8 * 16
    assert f"f32[{n_tokens},{50304 // 4}]" in jaxpr
    assert f"[{n_tokens},50304]" not in jaxpr and f"[{n_tokens},50257]" not in jaxpr
    assert (f"f32[4,{n_tokens},{50304 // 4}]" in jaxpr) == bool(kept)


def test_loss_at_initialisation_is_that_of_a_uniform_guess():
    state, train, _ = start(CONFIG)
    _, metrics = train(state, batch(CONFIG))
    assert float(metrics["loss"]) == pytest.approx(math.log(300), abs=0.05)


def test_one_batch_overfits():
    config = dataclasses.replace(CONFIG, learning_rate=1e-2, steps=200)
    state, train, _ = start(config)
    for _ in range(120):
        state, metrics = train(state, batch(config))
    assert float(metrics["loss"]) < 0.05
    assert int(state.step) == 120


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_accumulation_equals_the_large_batch(dropout):
    model = dataclasses.replace(MODEL, dropout=dropout)
    config = dataclasses.replace(CONFIG, model=model)
    params = transformer.init(model, jax.random.key(0))
    grads = jax.jit(train_step.mean_gradients, static_argnums=0)
    n = jnp.int32(3)
    whole, g1 = grads(config, params, batch(config), n)
    for micro in (2, 4):
        split, g2 = grads(config, params, batch(config, micro), n)
        assert abs(whole - split) < 1e-6
        for x, y in zip(jax.tree.leaves(g1), jax.tree.leaves(g2), strict=True):
            assert np.abs(x - y).max() < 1e-6
    if dropout:
        other_step, _ = grads(config, params, batch(config), jnp.int32(4))
        assert abs(whole - other_step) > 1e-4


@pytest.mark.slow
def test_loss_curves_agree_whatever_the_accumulation():
    """Fifty steps with dropout, and a learning rate at which rounding is not amplified."""
    model = dataclasses.replace(MODEL, dropout=0.1)
    curves = []
    for micro in (1, 2, 4):
        config = dataclasses.replace(CONFIG, model=model, grad_accum=micro, ema_decay=0.9)
        state, train, _ = start(config)
        losses = []
        for n in range(50):
            state, metrics = train(state, batch(config, micro, seed=n))
            losses.append(float(metrics["loss"]))
        curves.append(losses)
    assert CONFIG.learning_rate <= 1e-3 and curves[0][-1] < curves[0][0]
    for curve in curves[1:]:
        assert np.allclose(curve, curves[0], rtol=1e-5, atol=0)
    assert curves[1] != curves[0]  # they are computed otherwise


def test_recomputation_changes_no_gradient():
    """The traced programs differ, so that the flag is seen to act."""
    model = dataclasses.replace(MODEL, dropout=0.1)
    params = transformer.init(model, jax.random.key(0))
    results, programs = [], []
    for remat in ("blocks", "products", "none"):
        config = dataclasses.replace(CONFIG, model=model, remat=remat)
        args = (params, batch(config), jnp.int32(0))
        results.append(jax.jit(train_step.mean_gradients, static_argnums=0)(config, *args))
        programs.append(
            str(jax.make_jaxpr(train_step.mean_gradients, static_argnums=0)(config, *args))
        )
    assert len(set(programs)) == 3 and "remat" not in programs[2]
    for result in results[1:]:
        for x, y in zip(*map(jax.tree.leaves, (results[0], result)), strict=True):
            assert np.abs(x - y).max() < 1e-6


def test_the_state_is_donated():
    state, train, _ = start(CONFIG)
    new, _ = train(state, batch(CONFIG))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_evaluation_weighs_and_changes_nothing():
    state, _, evaluate = start(CONFIG)
    tokens = batch(CONFIG)[0]
    weights = np.random.default_rng(0).integers(2, size=(8, 16)).astype(np.float32)
    total, n = evaluate(state.params, tokens, weights)
    expected = full_losses(MODEL, state.params, jnp.asarray(tokens)) * weights
    assert float(n) == weights.sum()
    assert float(total) == pytest.approx(float(expected.sum()), rel=1e-5)


@pytest.mark.parametrize("rows", [128, 1000])
def test_objective_against_its_textbook_form(monkeypatch, rows):
    """Label smoothing with one-hot targets, z-loss from full logits, padding not in sight."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", rows)
    config = dataclasses.replace(CONFIG, label_smoothing=0.1, z_loss=0.01)
    params = jax.tree.map(lambda a: a * 3, transformer.init(MODEL, jax.random.key(0)))
    tokens = jnp.asarray(batch(CONFIG)[0])
    logits = transformer.forward(MODEL, params, tokens[:, :-1])
    targets = jax.nn.one_hot(tokens[:, 1:], 300) * 0.9 + 0.1 / 300
    logp = jax.nn.log_softmax(logits, axis=-1)
    expected = -(targets * logp).sum(-1) + 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2
    aim, plain = loss.objective(config, params, tokens)
    assert float(aim) == pytest.approx(float(expected.mean()), rel=1e-5)
    reported, _ = train_step.mean_gradients(config, params, tokens[None], jnp.int32(0))
    for loss_in_nats in (plain, reported):  # what is learned may be smoothed, not what is told
        exact = float(full_losses(MODEL, params, tokens).mean())
        assert float(loss_in_nats) == pytest.approx(exact, rel=1e-5)
    assert abs(float(aim) - float(plain)) > 0.01


def test_only_matrices_decay():
    params = transformer.init(MODEL, jax.random.key(0))
    decayed = jax.tree_util.tree_leaves_with_path(optimizer.decayed(params))
    names = {jax.tree_util.keystr(path[-1:], simple=True) for path, yes in decayed if yes}
    spared = {jax.tree_util.keystr(path[-1:], simple=True) for path, yes in decayed if not yes}
    assert names == {"tokens", "positions", "kernel"}
    assert spared == {"scale", "bias"}


def test_schedule_warms_up_and_ends_at_the_minimum():
    config = dataclasses.replace(CONFIG, steps=100, warmup_steps=10)
    rates = [float(optimizer.make_schedule(config)(i)) for i in range(101)]
    assert 0 < rates[0] < rates[5] < rates[10] == pytest.approx(1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert (rates[54] + rates[55]) / 2 == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[99] == rates[100] == pytest.approx(1e-4)  # the last of 100 updates
