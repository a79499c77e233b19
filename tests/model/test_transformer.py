"""The model as a Flax module: weights, precision, dropout. test_choices.py has its function."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from jax.sharding import PartitionSpec as P

from gpt.config import ModelConfig, TrainConfig
from gpt.model import kv_cache as kv
from gpt.model import layers, transformer
from gpt.training import step_functions

SMALL = ModelConfig(300, context_length=24, n_layers=3, n_heads=4, d_model=32)
TOKENS = np.random.default_rng(1).integers(300, size=(4, 16)).astype(np.int32)
forward = jax.jit(transformer.forward, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    """Weights far from their initial values: a zero bias or a unit scale would hide a bug."""
    noise = np.random.default_rng(0)
    drawn = transformer.init(SMALL, jax.random.key(0))
    return jax.tree.map(lambda a: a + noise.normal(0, 0.1, a.shape).astype("float32"), drawn)


def test_the_model_is_a_flax_module(capsys):
    """Called, displayed and asked for its partition as Flax's guides do; as the functional form."""
    model = transformer.GPT(SMALL, rngs=nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(model))
    drawn = transformer.init(SMALL, jax.random.key(3))
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(drawn)))
    assert np.array_equal(model(TOKENS), transformer.forward(SMALL, drawn, TOKENS))

    nnx.display(model)
    assert "kernel=Param" in capsys.readouterr().out

    for stacked, layer_axis in ((True, (None,)), (False, ())):
        axes = transformer.logical_axes(SMALL, stacked)
        block = axes["blocks"] if stacked else axes["blocks"][2]
        assert block["attention"]["q"]["kernel"] == P(*layer_axis, "embed", "heads", None)
        assert block["mlp"]["down"]["kernel"] == P(*layer_axis, "mlp", "embed")
        assert axes["tokens"] == P("vocab", "embed")
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
    assert transformer.logical_axes(SMALL) == specs


def test_a_cache_needs_unstacked_weights(params):
    model = transformer.bind(SMALL, params)
    with pytest.raises(ValueError, match=r"needs unstacked weights.* transformer\.unstack"):
        model.hidden(TOKENS, kv.empty(SMALL, 4))


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
        return step_functions.objective(TrainConfig(model=config), params, TOKENS)[0]

    with jax.default_matmul_precision(None):  # as a user has it; the tests themselves set another
        traced = jax.make_jaxpr(jax.grad(loss_of))(transformer.abstract(config))
    found = [eqn.params["precision"] for eqn in products(traced.jaxpr)]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(found) > 20 and set(found) == ({highest} if dtype == "float32" else {None})


@pytest.mark.parametrize(("remat", "unroll"), [("blocks", False), ("none", True)])
def test_recomputing_and_unrolling_are_two_choices(remat, unroll):
    def total(params):
        return transformer.forward(SMALL, params, TOKENS, remat=remat, unroll=unroll).sum()

    text = str(jax.make_jaxpr(jax.grad(total))(transformer.abstract(SMALL)))
    assert ("remat" in text) == (remat == "blocks")
    assert (f"unroll={SMALL.n_layers}" in text or "unroll=True" in text) == unroll


def test_vocabulary_padding_is_never_seen(params):
    logits = forward(SMALL, params, TOKENS)
    assert SMALL.padded_vocab == 384 and logits.shape == (4, 16, 300)
    poisoned = params | {"tokens": params["tokens"].at[300:].set(1e6)}
    assert np.array_equal(logits, forward(SMALL, poisoned, TOKENS))


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
    queries = block["attention"]["q"]["kernel"]
    assert not np.array_equal(queries[0], queries[1])


@pytest.mark.parametrize("stacked", [True, False])
def test_dropout_belongs_to_the_row(stacked, params):
    """A row's mask depends on its key alone: not on its place nor on its neighbours."""
    config = dataclasses.replace(SMALL, dropout=0.3)
    params = params if stacked else transformer.unstack(params)
    keys = jax.random.split(jax.random.key(7), 4)
    dropped = jax.jit(
        lambda ids, keys: transformer.forward(config, params, ids, dropout_key_B=keys)
    )
    out = np.asarray(dropped(TOKENS, keys))
    order = np.array([2, 0, 3, 1])
    assert np.abs(out[order] - dropped(TOKENS[order], keys[order])).max() < 1e-5
    assert np.abs(out - forward(config, params, TOKENS)).max() > 0.1
    other = dropped(TOKENS, jax.random.split(jax.random.key(8), 4))
    assert np.abs(out - other).max() > 0.1


def test_dropout_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 4)
    kept = layers.dropout(jnp.ones((4, 1000)), keys, 0.2, site="mlp")
    assert set(np.unique(kept)) == {0, np.float32(1 / 0.8)}
    assert np.mean(kept) == pytest.approx(1, abs=0.05)


def test_bfloat16_stays_near_float32(params):
    exact = forward(SMALL, params, TOKENS)
    logits = forward(SMALL.computing_in("bfloat16"), params, TOKENS)
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

    ours = gradients(functools.partial(layers.narrowing_matmul, None))(x_MI, kernel_IO)
    plain = gradients(jnp.matmul)(x_MI, kernel_IO)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_lies_past_the_end_of_the_cache_is_dropped():
    new_BKTH = jnp.broadcast_to(jnp.array([5, 7])[:, None], (2, 1, 2, 3))
    pos_BT = jnp.array([[3, 4], [1, 2]])
    filled_BKSH = kv.write(jnp.zeros((2, 1, 4, 3)), new_BKTH, pos_BT)
    assert np.array_equal(filled_BKSH[:, 0, :, 0], [[0, 0, 0, 5], [0, 5, 7, 0]])
