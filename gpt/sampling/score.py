"""How likely a given text is: log-probabilities of its tokens, without a cache.

A text longer than the context is read in windows; each window but the first re-reads `overlap`
tokens, so that every token is predicted from at least that many (Hugging Face's strided
perplexity).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model import transformer
from gpt.sampling.engine import bucket


@dataclass(frozen=True)
class Score:
    """`logprobs[i]` is log p(token_ids[i] | what precedes it) in nats; the first one follows
    end-of-text. `n_bytes`: length of the text in UTF-8."""

    token_ids: list[int]
    logprobs: list[float]
    n_bytes: int

    @property
    def mean_nll(self) -> float:
        """Mean loss, nats a token."""
        return -sum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(mean_nll); infinite where that overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of the text."""
        return -sum(self.logprobs) / math.log(2) / max(self.n_bytes, 1)


@partial(jax.jit, static_argnames="config")
def target_logprobs(config: ModelConfig, params: dict, tokens_BT, targets_BT) -> jax.Array:
    """log p(targets_BT) after reading tokens_BT up to each position."""
    logits_BTV = transformer.forward(config, params, tokens_BT)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def score_ids(
    config: ModelConfig, params: dict, ids: Sequence[int], eot: int, overlap: int | None = None
) -> list[float]:
    """Log-probabilities of `ids`, the first after end-of-text. `overlap` defaults to half the
    context."""
    require(len(ids) > 0, "there is nothing to score: expected a text of at least one token")
    size = config.context_length
    overlap = size // 2 if overlap is None else overlap
    sequence = np.asarray([eot, *ids], np.int32)
    logprobs: list[float] = []
    start = 0
    while len(logprobs) < len(ids):
        window = sequence[start : start + size + 1]
        width = bucket(len(window) - 1, size)
        tokens_BT, targets_BT = np.zeros((2, 1, width), np.int32)
        tokens_BT[0, : len(window) - 1], targets_BT[0, : len(window) - 1] = window[:-1], window[1:]
        scored_T = np.asarray(target_logprobs(config, params, tokens_BT, targets_BT))[0]
        fresh = scored_T[len(logprobs) - start : len(window) - 1]
        logprobs += [float(p) for p in fresh]
        start = len(logprobs) - min(overlap, size - 1)
    return logprobs


def score(model, text: str) -> Score:
    """Score of `text` under `model` (config, params, tokenizer)."""
    ids = model.tokenizer.encode_ordinary(text)
    logprobs = score_ids(model.config, model.params, ids, model.tokenizer.eot_token)
    return Score(list(ids), logprobs, len(text.encode("utf-8", "replace")))
