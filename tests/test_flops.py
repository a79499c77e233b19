"""The arithmetic of gpt/flops.py against the shapes of real arrays and against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gpt import flops
from gpt.config import MeshConfig, ModelConfig
from gpt.model import kv_cache, transformer
from gpt.presets import PRESETS
from gpt.sampling.language_model import for_decoding
from gpt.sharding import make_decoding_mesh

SMALL = ModelConfig(300, context_length=64, n_layers=3, n_heads=4, d_model=64)
VARIANTS = {
    "small": SMALL,
    "one kv head, odd mlp": dataclasses.replace(SMALL, n_kv_heads=1, d_ff=100, bias=False),
    "bfloat16": dataclasses.replace(SMALL, param_dtype="bfloat16", cache_dtype="bfloat16"),
    "one layer, whole tiles": dataclasses.replace(SMALL, n_layers=1, vocab_size=256),
}
CONFIGS = {name: train.model for name, train in PRESETS.items()} | VARIANTS


def n_bytes(tree):
    """Bytes of arrays of these shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cache_bytes(config, batch, slots):
    """Bytes of the keys and values of a real cache's shapes."""
    cache = jax.eval_shape(lambda: kv_cache.grow(kv_cache.empty(config, batch), slots))
    return n_bytes((cache.k, cache.v))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_the_real_arrays(name):
    """Their bytes; their number is compared in tests/model/test_choices.py."""
    shapes = transformer.abstract(CONFIGS[name])
    assert flops.weight_bytes(CONFIGS[name]) == n_bytes(shapes)
    narrow = jax.tree.map(lambda leaf: leaf.update(dtype="bfloat16"), shapes)
    assert flops.weight_bytes(CONFIGS[name], "bfloat16") == n_bytes(narrow)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_for_sampling_are_in_the_type_of_the_products(compute, quantize):
    """Converted once and not at each step; bfloat16 weights stay what they are on a CPU."""
    mesh = make_decoding_mesh(MeshConfig(data=1))
    for param in ("float32", "bfloat16"):
        config = dataclasses.replace(SMALL, param_dtype=param).computing_in(compute)
        stacked = transformer.init(config, jax.random.key(0))
        params = for_decoding(config, mesh, quantize, stacked)
        kept = config.for_sampling()
        assert kept.param_dtype == ("bfloat16" if "bfloat16" in (param, compute) else "float32")
        assert n_bytes(params) == flops.weight_bytes(kept, int8=quantize is not None)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_sampling_moves(name):
    """All weights but the positions that are not read, the cache so far, and what is written."""
    config = VARIANTS[name]
    shapes = transformer.abstract(config)
    row_bytes = n_bytes(shapes["positions"]) // config.context_length

    assert flops.cache_bytes(config, 3, 48) == cache_bytes(config, 3, 48)
    for batch in (1, 3, 100):
        unread = max(config.context_length - batch, 0) * row_bytes
        moved = n_bytes(shapes) - unread + cache_bytes(config, batch, 21)
        assert flops.decode_bytes(config, batch, 20) == moved
    unread = (config.context_length - 20) * row_bytes
    moved = n_bytes(shapes) - unread + cache_bytes(config, 3, 20)
    assert flops.prefill_bytes(config, 3, 20) == moved


# Wide, so that norms and activations, which XLA counts and flops.py leaves out, are within 1 %.
WIDE = ModelConfig(512, context_length=48, n_layers=2, n_heads=2, d_model=768)
SHAPES = {
    "wide": WIDE,
    "grouped": dataclasses.replace(
        WIDE, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=1000, vocab_size=4096
    ),
}


def xla_flops(function, *shapes):
    """What XLA counts in the program of `function`, before it optimizes anything away."""
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def masked_flops(config, n_tokens):
    """Scores and mixes of the slots that the mask hides: XLA computes them, flops.py does not."""
    hidden_keys = n_tokens * n_tokens - n_tokens * (n_tokens + 1) // 2
    return 4 * config.n_layers * config.n_heads * config.head_width * hidden_keys


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_flops_are_xlas(config):
    """Of prefill, of decode with a cache in which every slot is visible, and of training."""

    def prefill(params, tokens):
        model = transformer.bind(config, params)
        x, _ = model.hidden(tokens)
        return model.unembed(x[:, -1])

    def decode(params, token, past):
        model = transformer.bind(config, params)
        x, past = model.hidden(token, past)
        return model.unembed(x[:, 0]), past

    def total(params, tokens):
        return jnp.sum(transformer.forward(config, params, tokens) ** 2)

    T = config.context_length
    # Layer by layer: XLA counts a scan's body once.
    params = jax.eval_shape(transformer.unstack, transformer.abstract(config))
    for n in (1, 16):
        tokens = jax.ShapeDtypeStruct((1, n), jnp.int32)
        counted = xla_flops(prefill, params, tokens) - masked_flops(config, n)
        ours = flops.forward_flops(config, n, n_logit_positions=1)
        assert ours == pytest.approx(counted, rel=0.01)

    past = jax.eval_shape(lambda: kv_cache.grow(kv_cache.empty(config, 1), T))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    counted = xla_flops(decode, params, token, past)
    ours = flops.forward_flops(config, 1, n_before=T - 1, n_logit_positions=1)
    assert ours == pytest.approx(counted, rel=0.01)

    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    counted = xla_flops(jax.value_and_grad(total), params, tokens) - 3 * masked_flops(config, T)
    assert flops.train_flops_per_token(config) * T == pytest.approx(counted, rel=0.01)


def test_reading_in_pieces_costs_as_much_as_at_once():
    """What the mask hides is not counted: XLA, which computes it, cannot show this."""
    pieces = [(0, 5), (5, 1), (6, 42)]
    apart = sum(flops.forward_flops(WIDE, n, n_before=before) for before, n in pieces)
    assert apart == flops.forward_flops(WIDE, 48)
