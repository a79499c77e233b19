"""Untrained byte-level models, loud enough to prefer some bytes over others."""

import functools
import types

import jax

from gpt.config import ModelConfig
from gpt.data import tokenizers
from gpt.model import transformer

LETTERS = tokenizers.create("byte", lambda: (), 0)


@functools.partial(jax.jit, static_argnums=0)
def weights(config: ModelConfig, seed, loudness) -> dict:
    """Weights as decoding wants them; compiled once for all seeds of a shape."""
    params = transformer.init(config, jax.random.key(seed))
    params = jax.tree.map(lambda a: a * loudness if a.ndim > 1 else a, params)
    return transformer.unstack(params)


def make_model(config: ModelConfig, seed: int = 0, loudness: float = 6.0):
    """What generate, beam and score take for a model."""
    params = weights(config, seed, loudness)
    return types.SimpleNamespace(config=config, params=params, tokenizer=LETTERS, mesh=None)
