"""The forward pass: against an independent form, causal, initialised as GPT-2 is."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest
from flax import nnx
from jax.extend import core
from jax.sharding import PartitionSpec as P

from gpt import flops
from gpt.config import ModelConfig
from gpt.model import attention, kv_cache, transformer
from gpt.model.layers import narrowing_matmul
from gpt.presets import PRESETS
from gpt.training import loss

SMALL = ModelConfig(300, context_length=24, n_layers=3, n_heads=4, d_model=32)


def weights(config, seed=0):
    """Weights far from their initial values: a zero bias or a unit scale would hide a bug."""
    params = transformer.init(config, jax.random.key(seed))
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + noise.normal(0, 0.1, a.shape).astype("float32"), params)


def tokens(config, rows=2, length=16, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(config.vocab_size, size=(rows, length)).astype(np.int32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_forward_equals_numpy(bias, n_kv_heads):
    config = dataclasses.replace(SMALL, bias=bias, n_kv_heads=n_kv_heads)
    params, ids = weights(config), tokens(config)
    logits = np.asarray(transformer.forward(config, params, ids))
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for row in range(len(ids)):
        oracle = numpy_transformer.forward(exact, ids[row], config)
        assert np.abs(logits[row] - oracle).max() < 1e-5 * max(1, np.abs(oracle).max())


def test_both_layouts_agree_and_convert_exactly():
    params, ids = weights(SMALL), tokens(SMALL)
    forward = jax.jit(transformer.forward, static_argnums=0)
    unstacked = transformer.unstack(params)
    difference = forward(SMALL, params, ids) - forward(SMALL, unstacked, ids)
    assert np.abs(difference).max() < 1e-5
    again = transformer.stack(unstacked)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))


def test_the_model_is_a_flax_module(capsys):
    """Called, displayed and asked for its partition as Flax's guides do; as the functional form."""
    model = transformer.GPT(SMALL, rngs=nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(model))
    drawn = transformer.init(SMALL, jax.random.key(3))
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(drawn)))
    assert np.array_equal(model(tokens(SMALL)), transformer.forward(SMALL, drawn, tokens(SMALL)))

    nnx.display(model)
    assert "kernel=Param" in capsys.readouterr().out

    for stacked, layers in ((True, (None,)), (False, ())):
        axes = transformer.logical_axes(SMALL, stacked)
        block = axes["blocks"] if stacked else axes["blocks"][2]
        assert block["attention"]["q"]["kernel"] == P(*layers, "embed", "heads", None)
        assert block["mlp"]["down"]["kernel"] == P(*layers, "mlp", "embed")
        assert axes["tokens"] == P("vocab", "embed")
    assert transformer.logical_axes(SMALL) == nnx.to_pure_dict(
        nnx.get_partition_spec(nnx.state(model))
    )


def test_a_cache_needs_unstacked_weights():
    model = transformer.bind(SMALL, weights(SMALL))
    with pytest.raises(ValueError, match=r"needs unstacked weights.* transformer\.unstack"):
        model.hidden(tokens(SMALL), kv_cache.empty(SMALL, 2))


def products(jaxpr):
    """Every dot_general of a traced function, those of inner functions too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from products(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_full_float32_on_accelerators_too(dtype):
    """Which would multiply float32 in TF32 or bfloat16: in the loss and in its gradient."""
    config = SMALL.computing_in(dtype)

    def loss_of(params):
        return loss.sequence_losses(config, params, tokens(SMALL))[0].mean()

    with jax.default_matmul_precision(None):  # as a user has it; the tests themselves set another
        traced = jax.make_jaxpr(jax.grad(loss_of))(transformer.abstract(config))
    found = [eqn.params["precision"] for eqn in products(traced.jaxpr)]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(found) > 20 and set(found) == ({highest} if dtype == "float32" else {None})


@pytest.mark.parametrize(("remat", "unroll"), [*itertools.product([True, False], repeat=2)])
def test_recomputing_and_unrolling_are_two_choices(remat, unroll):
    params, ids = transformer.abstract(SMALL), tokens(SMALL)

    def total(params):
        return transformer.forward(SMALL, params, ids, remat=remat, unroll=unroll).sum()

    text = str(jax.make_jaxpr(jax.grad(total))(params))
    assert ("remat" in text) == remat
    assert (f"unroll={SMALL.n_layers}" in text or "unroll=True" in text) == unroll


def test_no_future_by_perturbation():
    params, ids = weights(SMALL), tokens(SMALL)
    forward = jax.jit(transformer.forward, static_argnums=0)
    before = np.asarray(forward(SMALL, params, ids))
    for t in range(1, ids.shape[1]):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
        after = np.asarray(forward(SMALL, params, changed))
        assert np.array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t:], before[:, t:])


def test_no_future_by_gradient():
    """The embedding of token t has no gradient from logits before t, and some from each after."""
    params, ids = weights(SMALL), np.arange(12, dtype=np.int32)[None]

    def logit_at(table, t):
        logits = transformer.forward(SMALL, params | {"tokens": table}, ids)
        return jnp.sum(jax.lax.dynamic_index_in_dim(logits, t, axis=1)[..., 100:])

    gradient = jax.jit(jax.grad(logit_at))
    for t in range(12):
        # Rows 100 and on serve as the head; token ids 0..11 are read by the input alone.
        reached = np.abs(np.asarray(gradient(params["tokens"], t)))[:12].sum(-1) > 0
        assert np.array_equal(reached, np.arange(12) <= t)


def test_vocabulary_padding_is_never_seen():
    assert SMALL.padded_vocab == 384
    params, ids = weights(SMALL), tokens(SMALL)
    logits = transformer.forward(SMALL, params, ids)
    assert logits.shape == (2, 16, 300)
    poisoned = params | {"tokens": params["tokens"].at[300:].set(1e6)}
    assert np.array_equal(logits, transformer.forward(SMALL, poisoned, ids))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)],
)
def test_presets_have_gpt2s_size(name, millions):
    """Parameter counts of the published checkpoints."""
    assert flops.parameters(PRESETS[name].model) / 1e6 == pytest.approx(millions, abs=0.05)


def test_initial_scales_are_gpt2s():
    config = dataclasses.replace(SMALL, d_model=64, n_layers=8)
    params = transformer.init(config, jax.random.key(0))
    block, residual = params["blocks"], 0.02 / math.sqrt(2 * config.n_layers)
    for weight, std in [
        (params["tokens"], 0.02),
        (block["attention"]["q"]["kernel"], 0.02),
        (block["attention"]["o"]["kernel"], residual),
        (block["mlp"]["up"]["kernel"], 0.02),
        (block["mlp"]["down"]["kernel"], residual),
    ]:
        assert np.std(weight) == pytest.approx(std, rel=0.05)
    layers = block["attention"]["q"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])


def test_a_recorder_can_stand_in_for_attention():
    """A recorder passed as `attend` sees every layer's queries and changes nothing."""
    seen = []

    def recorder(q, k, v, pos, drop):
        seen.append((q.shape, k.shape))
        return attention.attend(q, k, v, pos, drop)

    params, ids = transformer.unstack(weights(SMALL)), tokens(SMALL)
    model = transformer.bind(SMALL, params)
    x, _ = model.hidden(ids, attend=recorder)
    assert seen == [((2, 16, 4, 8), (2, 4, 16, 8))] * 3
    assert np.array_equal(x, model.hidden(ids)[0])


@pytest.mark.parametrize("stacked", [True, False])
def test_dropout_belongs_to_the_row(stacked):
    """A row's mask depends on its key alone: not on its place nor on its neighbours."""
    config = dataclasses.replace(SMALL, dropout=0.3)
    params, ids = weights(config), tokens(config, rows=4)
    params = params if stacked else transformer.unstack(params)
    keys = jax.random.split(jax.random.key(7), 4)
    forward = jax.jit(lambda ids, keys: transformer.forward(config, params, ids, key_B=keys))
    out = np.asarray(forward(ids, keys))
    order = np.array([2, 0, 3, 1])
    assert np.abs(out[order] - np.asarray(forward(ids[order], keys[order]))).max() < 1e-5
    assert np.abs(out - transformer.forward(config, params, ids)).max() > 0.1
    other = forward(ids, jax.random.split(jax.random.key(8), 4))
    assert np.abs(out - other).max() > 0.1


def test_bfloat16_stays_near_float32():
    params, ids = weights(SMALL), tokens(SMALL)
    exact = transformer.forward(SMALL, params, ids)
    logits = transformer.forward(SMALL.computing_in("bfloat16"), params, ids)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * float(exact.std())


def test_gradients_of_a_kernel_that_narrows_are_those_of_a_plain_product():
    # They are computed by a rule of ours (layers.narrowing_matmul), in another order of sums.
    x_key, kernel_key, y_key = jax.random.split(jax.random.key(0), 3)
    x_MI = jax.random.normal(x_key, (64, 48))
    kernel_IO = jax.random.normal(kernel_key, (48, 16))
    weights_MO = jax.random.normal(y_key, (64, 16))

    def gradients(product):
        return jax.grad(lambda x, kernel: (product(x, kernel) * weights_MO).sum(), (0, 1))

    ours = gradients(functools.partial(narrowing_matmul, None))(x_MI, kernel_IO)
    plain = gradients(jnp.matmul)(x_MI, kernel_IO)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
