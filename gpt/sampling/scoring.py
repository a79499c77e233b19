"""How likely a given text is: log-probabilities of its tokens, without a cache.

A text longer than the context is read in windows of the size of the context. Each begins `stride`
tokens after the one before and predicts only what that one did not, so that every token is
predicted once, from at least context - stride tokens before it (the strided perplexity of Hugging
Face's documentation).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt.compile_log import compilations
from gpt.config import ModelConfig
from gpt.data.tokenizers import without_lone_surrogates
from gpt.errors import require
from gpt.model import transformer
from gpt.sampling.completion import require_number
from gpt.sampling.engine import bucket
from gpt.sharding import on_mesh

ROWS = 8  # windows read together; the remaining ones are read one by one


@dataclass(frozen=True)
class Score:
    """`logprobs[i]` is log p(token_ids[i] | what precedes it) in nats; the first one follows
    end-of-text. `n_bytes`: length of the text in UTF-8. `context`, `stride`: tokens a window reads,
    and tokens from one window to the next."""

    token_ids: list[int]
    logprobs: list[float]
    n_bytes: int
    context: int
    stride: int

    @property
    def mean_nll(self) -> float:
        """Mean loss in nats per token."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(mean_nll); infinite where that overflows."""
        return math.inf if self.mean_nll >= 700 else math.exp(self.mean_nll)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of the text."""
        return -math.fsum(self.logprobs) / math.log(2) / max(self.n_bytes, 1)

    def __str__(self) -> str:
        return (
            f"{len(self.token_ids)} tokens: {self.mean_nll:.4f} nats per token, "
            f"{self.bits_per_byte:.4f} bits per byte, perplexity {self.perplexity:.2f} "
            f"(context {self.context}, stride {self.stride})"
        )

    def to_json(self) -> dict:
        """All of it as JSON values."""
        return {
            "tokens": len(self.token_ids),
            "mean_nll": self.mean_nll,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "context": self.context,
            "stride": self.stride,
        }


@partial(jax.jit, static_argnames="config")
def target_logprobs(config: ModelConfig, params: dict, tokens_BT, targets_BT) -> jax.Array:
    """log p(targets_BT) after reading tokens_BT up to each position.

    The logits of one row at a time: those of all would be larger than the model.
    """
    model = transformer.bind(config, params)
    x_BTD, _ = model.hidden(tokens_BT)

    def score_row(row):
        x_TD, targets_T = row
        logits_TV = model.unembed(x_TD)
        target_logits_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
        return target_logits_T - jax.nn.logsumexp(logits_TV, axis=-1)

    return jax.lax.map(score_row, (x_BTD, targets_BT))


def cut_windows(n: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """(first token read, first and end of those predicted) of each window over `n` tokens.

    Token i is predicted from what precedes it, so a window that begins at `a` reads a..a + size - 1
    of [end-of-text, *ids] and predicts ids from a on.
    """
    n_windows = 1 + max(0, math.ceil((n - size) / stride))
    windows = []
    predicted = 0
    for i in range(n_windows):
        end = min(size + i * stride, n)
        windows.append((i * stride, predicted, end))
        predicted = end
    return windows


def batches(windows: list) -> list[list]:
    """The windows in full batches, and the rest one by one: two shapes to compile."""
    n_full = len(windows) // ROWS * ROWS
    full = [windows[i : i + ROWS] for i in range(0, n_full, ROWS)]
    return full + [[window] for window in windows[n_full:]]


def choose_stride(config: ModelConfig, stride: int | None) -> int:
    """`stride`, by default half the context; UserError unless it is from 1 to the context."""
    size = config.context_length
    if stride is None:
        stride = max(1, size // 2)
    require(1 <= stride <= size, f"stride is {stride}: expected 1 to {size}, the model's context")
    return stride


def require_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise UserError unless there are ids, all of them in the vocabulary."""
    require(len(ids) > 0, "there is nothing to score: expected a text of at least one token")
    for token in ids:
        require(
            0 <= token < vocab_size, f"no token has the id {token}: expected 0 to {vocab_size - 1}"
        )


def score_ids(
    config: ModelConfig, params: dict, ids: Sequence[int], eot: int, stride: int | None = None
) -> list[float]:
    """Log-probabilities of `ids`, the first after end-of-text; `params` is unstacked.

    `stride`: see the top of this file (default: half the context). UserError if there are no ids,
    if one of them or the stride is out of range, or if the model gives no numbers.
    """
    require_ids(ids, config.vocab_size)
    size, stride = config.context_length, choose_stride(config, stride)
    sequence = np.asarray([eot, *ids], np.int32)
    width = bucket(len(ids), size)
    logprobs = np.empty(len(ids))
    for windows in batches(cut_windows(len(ids), size, stride)):
        tokens_BT, targets_BT = np.zeros((2, len(windows), width), np.int32)
        for row, (start, _, end) in enumerate(windows):
            tokens_BT[row, : end - start] = sequence[start:end]
            targets_BT[row, : end - start] = sequence[start + 1 : end + 1]
        with compilations.of(batch=len(windows), bucket=width):
            scored_BT = np.asarray(target_logprobs(config, params, tokens_BT, targets_BT))
        for row, (start, done, end) in enumerate(windows):
            logprobs[done:end] = scored_BT[row, done - start : end - start]
    first = int(np.isnan(logprobs).argmax())  # 0 if none is
    require_number(logprobs[first], first + 1)
    return logprobs.tolist()


def score(model, text: str | Sequence[int], stride: int | None = None) -> Score:
    """Score of a text, or of token ids, under `model` (config, params, tokenizer)."""
    if isinstance(text, str):
        text = without_lone_surrogates(text)
        ids, n_bytes = model.tokenizer.encode_ordinary(text), len(text.encode())
    else:
        ids = list(text)
        require_ids(ids, model.config.vocab_size)
        n_bytes = len(model.tokenizer.decode_bytes(ids))
    eot = model.tokenizer.eot_token
    require(
        0 <= eot < model.config.vocab_size,
        "the model has no end-of-text, which a scored text follows: it cannot be scored",
    )
    with on_mesh(model.mesh):
        logprobs = score_ids(model.config, model.params, ids, eot, stride)
    size = model.config.context_length
    return Score(list(ids), logprobs, n_bytes, size, choose_stride(model.config, stride))
