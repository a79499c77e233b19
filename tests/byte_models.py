"""Untrained byte-level models, loud enough to prefer some bytes over others."""

import functools

import jax

from gpt.config import ModelConfig
from gpt.data import tokenizers
from gpt.model import transformer
from gpt.sampling.language_model import LanguageModel

LETTERS = tokenizers.create("byte", lambda: (), 0)
# What tests use unless another shape is the point: its programs are compiled once for all of them.
CONFIG = ModelConfig(257, context_length=128, n_layers=2, n_heads=2, d_model=32)


@functools.partial(jax.jit, static_argnums=0)
def weights(config: ModelConfig, seed, loudness) -> dict:
    """Weights as decoding wants them; compiled once for all seeds of a shape."""
    params = transformer.init(config, jax.random.key(seed))
    params = jax.tree.map(lambda a: a * loudness if a.ndim > 1 else a, params)
    return transformer.unstack(params)


@functools.cache
def make_model(
    config: ModelConfig = CONFIG, seed: int = 0, loudness: float = 6.0, tokenizer=LETTERS
) -> LanguageModel:
    """A model as `gpt.load` returns it."""
    return LanguageModel(config, weights(config, seed, loudness), tokenizer, step=0)
