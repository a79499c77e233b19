"""The arithmetic of gpt/flops.py against real arrays and against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gpt import flops
from gpt.config import ModelConfig
from gpt.model import kv_cache, transformer
from gpt.presets import PRESETS

SMALL = ModelConfig(300, context_length=64, n_layers=3, n_heads=4, d_model=64)
VARIANTS = {
    "small": SMALL,
    "no bias": dataclasses.replace(SMALL, bias=False),
    "grouped": dataclasses.replace(SMALL, n_kv_heads=2),
    "one kv head, odd mlp": dataclasses.replace(SMALL, n_kv_heads=1, d_ff=100, bias=False),
    "bfloat16": dataclasses.replace(SMALL, param_dtype="bfloat16", cache_dtype="bfloat16"),
    "one layer, whole tiles": dataclasses.replace(SMALL, n_layers=1, vocab_size=256),
}
CONFIGS = {name: train.model for name, train in PRESETS.items()} | VARIANTS


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_the_real_arrays(name):
    """Every array's entries and bytes, less the rows that only pad the vocabulary."""
    config = CONFIGS[name]
    leaves = jax.tree.leaves(transformer.abstract(config))
    padding = (config.padded_vocab - config.vocab_size) * config.d_model
    assert flops.parameters(config) == sum(leaf.size for leaf in leaves) - padding
    assert flops.weight_bytes(config) == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_bytes_of_a_named_type():
    assert flops.weight_bytes(SMALL, "bfloat16") * 2 == flops.weight_bytes(SMALL, "float32")


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_of_arrays_in_memory(name):
    config = VARIANTS[name]
    params = transformer.init(config, jax.random.key(0))
    assert flops.weight_bytes(config) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    filled = kv_cache.grow(kv_cache.empty(config, 3), 48)
    held = sum(leaf.nbytes for leaf in (*filled.k, *filled.v))
    assert flops.cache_bytes(config, 3, 48) == held


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_decode_step_moves_what_it_must(name, batch):
    """All weights but unread positions, the cache so far, and one new position of it."""
    config = VARIANTS[name]
    params = transformer.init(config, jax.random.key(0))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    unread = params["positions"][batch:].nbytes
    held = kv_cache.grow(kv_cache.empty(config, batch), 21)
    assert flops.decode_bytes(config, batch, 20) == weights - unread + sum(
        leaf.nbytes for leaf in (*held.k, *held.v)
    )


# Wide, so that norms and activations, which XLA counts and flops.py leaves out, are within 1 %.
WIDE = ModelConfig(512, context_length=48, n_layers=2, n_heads=2, d_model=768)
SHAPES = {
    "wide": WIDE,
    "grouped": dataclasses.replace(WIDE, n_heads=4, n_kv_heads=2),
    "narrow mlp": dataclasses.replace(WIDE, n_layers=3, d_ff=1000, vocab_size=4096),
}


def xla_flops(function, *shapes):
    """What XLA counts in the program of `function`, before it optimizes anything away."""
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def unrolled(config):
    """Shapes of the weights, layer by layer: XLA counts a scan's body once."""
    return jax.eval_shape(lambda: transformer.unstack(transformer.init(config, jax.random.key(0))))


def masked_flops(config, n_tokens):
    """Scores and mixes of the slots that the mask hides: XLA computes them, flops.py does not."""
    hidden_keys = n_tokens * n_tokens - n_tokens * (n_tokens + 1) // 2
    return 4 * config.n_layers * config.n_heads * config.head_width * hidden_keys


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 16, 48])
def test_prefill_flops_are_xlas(config, n_tokens):
    def prefill(params, tokens):
        model = transformer.bind(config, params)
        x, _ = model.hidden(tokens)
        return model.unembed(x[:, -1])

    tokens = jax.ShapeDtypeStruct((1, n_tokens), jnp.int32)
    counted = xla_flops(prefill, unrolled(config), tokens) - masked_flops(config, n_tokens)
    assert flops.forward_flops(config, n_tokens, n_logit_positions=1) == pytest.approx(
        counted, rel=0.01
    )


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_decode_flops_are_xlas(config):
    """One token on top of a cache in which every slot is visible."""

    def decode(params, token, past):
        model = transformer.bind(config, params)
        x, past = model.hidden(token, past)
        return model.unembed(x[:, 0]), past

    past = jax.eval_shape(lambda: kv_cache.grow(kv_cache.empty(config, 1), 48))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    counted = xla_flops(decode, unrolled(config), token, past)
    assert flops.forward_flops(config, 1, n_before=47, n_logit_positions=1) == pytest.approx(
        counted, rel=0.01
    )


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_training_flops_are_xlas(config):
    def total(params, tokens):
        return jnp.sum(transformer.forward(config, params, tokens) ** 2)

    T = config.context_length
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    counted = xla_flops(jax.value_and_grad(total), unrolled(config), tokens)
    counted -= 3 * masked_flops(config, T)
    assert flops.train_flops_per_token(config) * T == pytest.approx(counted, rel=0.01)


def test_reading_in_pieces_costs_as_much_as_at_once():
    pieces = [(0, 5), (5, 1), (6, 42)]
    apart = sum(flops.forward_flops(WIDE, n, n_before=before) for before, n in pieces)
    assert apart == flops.forward_flops(WIDE, 48)


@pytest.mark.parametrize("name", VARIANTS)
def test_reading_prompts_moves_weights_and_what_is_kept(name):
    """All weights but positions past the prompt, and the keys and values of its tokens."""
    config = VARIANTS[name]
    params = transformer.init(config, jax.random.key(0))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    held = kv_cache.grow(kv_cache.empty(config, 3), 20)
    expected = weights - params["positions"][20:].nbytes
    expected += sum(leaf.nbytes for leaf in (*held.k, *held.v))
    assert flops.prefill_bytes(config, 3, 20) == expected
