"""Weights as int8: what they cost in accuracy, where they lie, and what a run says of them."""

import dataclasses
import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from programs import call, refuse

from gpt import flops, load
from gpt.config import MeshConfig, ModelConfig
from gpt.data.tokenizers import IdTokenizer
from gpt.model import int8, transformer
from gpt.model import kv_cache as kv
from gpt.sampling import cache_check, engine
from gpt.sampling.language_model import LanguageModel
from gpt.sharding import DECODING_RULES, make_decoding_mesh, state_shardings

GPT2 = ModelConfig(300, 64, n_layers=2).computing_in("float32")
MODERN = dataclasses.replace(
    GPT2, positions="rope", norm="rms", mlp="swiglu", n_kv_heads=2, tied=False, bias=False,
    qk_norm=True,
)  # fmt: skip
CONFIGS = {"gpt2": GPT2, "modern": MODERN}
NUMBERS = st.floats(-1e4, 1e4, width=32)


@functools.cache
def weights(name):
    return transformer.unstack(transformer.init(CONFIGS[name], jax.random.key(0)))


@functools.cache
def quantized(name):
    return int8.quantize(weights(name))


@jax.jit
def quantized_and_back(w):
    return int8.quantize_matrix(w, (1,)).rows(jnp.arange(len(w)))


@given(hnp.arrays(np.float32, (6, 5), elements=NUMBERS))
def test_no_weight_is_further_away_than_half_a_level(w):
    """Rows of zeros and of one sign included."""
    back = np.asarray(quantized_and_back(w))
    room = np.abs(w).max(1, keepdims=True) / 127 / 2 * 1.001 + 1e-30
    assert np.all(np.abs(back - w) <= room)


@pytest.mark.parametrize("product", [int8.split_product, int8.plain_product])
@given(st.integers(0, 2**31 - 1))
def test_the_product_is_that_of_the_weights_it_stands_for(product, seed):
    """Integers times activations of 15 bits against NumPy in float64; rows of zeros too."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(3, 48)) * 10.0 ** random.integers(-6, 6, (3, 1))
    x[0] *= random.integers(2)
    ints = random.integers(-127, 128, (32, 48)).astype(np.int8)
    found = np.asarray(jax.jit(product)(x.astype(np.float32), ints))
    size = np.abs(x).max(1, keepdims=True) * np.sqrt(48) * 127
    assert np.all(np.abs(found - x @ ints.T.astype(float)) <= 2e-4 * size)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_computes_with_the_rounded_weights(name):
    """Every matrix is used the right way round: as a float model of the same rounded weights."""

    def rounded(leaf, inputs):
        held = int8.quantize_matrix(leaf, inputs)
        outputs = [axis for axis in range(leaf.ndim) if axis not in inputs]
        order = [*outputs, *inputs]
        back = (held.ints * held.scale[..., None]).reshape([leaf.shape[axis] for axis in order])
        return back.transpose(np.argsort(order))

    tokens_BT = np.random.default_rng(0).integers(300, size=(2, 20))
    forward = jax.jit(functools.partial(transformer.forward, CONFIGS[name]))
    expected = forward(int8.map_matrices(rounded, weights(name)), tokens_BT)
    found = forward(quantized(name), tokens_BT)
    assert jnp.abs(found - expected).max() < 2e-4 * jnp.abs(expected).max()
    # Rounding is seen: without it the logits differ by more than that.
    assert jnp.abs(found - forward(weights(name), tokens_BT)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_contract_holds(name):
    model = LanguageModel(CONFIGS[name], quantized(name), IdTokenizer(300, 0), step=0)
    checks = list(cache_check.run_checks(model))
    assert [str(one) for one in checks if not one.passed] == [] and len(checks) > 5


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_arrays(name):
    config, params = CONFIGS[name], quantized(name)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert flops.weight_bytes(config, int8=True) == total
    held = jax.eval_shape(lambda: kv.grow(kv.empty(config, 3), 21))
    unread = params["positions"][3:].nbytes if "positions" in params else 0
    unread += sum(leaf[3:].nbytes for leaf in jax.tree.leaves(params["tokens"]) if "head" in params)
    moved = total - unread + sum(leaf.size * 4 for leaf in (*held.k, *held.v))
    assert flops.decode_bytes(config, 3, 20, int8=True) == moved


def test_each_part_has_the_axes_of_its_weight():
    """Outputs keep theirs, inputs come last; the table splits them like the float weight."""
    config, mesh = CONFIGS["modern"], make_decoding_mesh(MeshConfig(data=1))
    axes = int8.quantize_axes(transformer.logical_axes(config, stacked=False))
    attention = axes["blocks"][0]["attention"]
    mlp = axes["blocks"][0]["mlp"]
    assert attention["q"]["kernel"] == int8.Int8(P("heads", None, "embed"), P("heads", None))
    assert attention["o"]["kernel"] == int8.Int8(P("embed", "heads"), P("embed"))
    assert mlp["down"]["kernel"] == int8.Int8(P("embed", "mlp"), P("embed"))
    assert mlp["up"]["kernel"] == int8.Int8(P("mlp", "embed"), P("mlp"))
    split = state_shardings(mesh, axes, quantized("modern"), DECODING_RULES)
    assert split["blocks"][0]["attention"]["q"]["kernel"].ints.spec == P("tensor", None, None)


def test_nothing_in_a_decode_step_is_a_float_copy_of_a_matrix():
    """Where memory is what limits it, a converted matrix would cost more than int8 saves."""
    config = CONFIGS["gpt2"]
    cache = jax.eval_shape(lambda: kv.grow(kv.empty(config, 1), 32))
    token_B, active_B = np.zeros(1, np.int32), np.ones(1, bool)
    step = engine.decode_step.lower(config, quantized("gpt2"), cache, token_B, active_B)
    text = step.compile().as_text()
    V, D, F = config.padded_vocab, config.d_model, config.ff_width
    for shape in (f"[{V},{D}]", f"[{D},{F}]", f"[{F},{D}]"):
        assert f"s8{shape}" in text and f"f32{shape}" not in text and f"s32{shape}" not in text


def test_a_run_is_sampled_and_scored(trained):
    """The flag of sample.py; what its score tells is tested in tests/test_sample.py."""
    _, run = trained
    assert "int8 changes the loss by" in call("sample", run, "--quantize=int8", "--score", "a").out
    generated = load(run, quantize="int8").generate("a", temperature=0, max_new_tokens=5)
    assert len(generated.token_ids) == 5
    refuse("int4", "sample", run, "--quantize", "int4")
