"""How likely a given text is: log-probabilities of its tokens.

A text longer than a window (by default the context) is read in several windows. Each begins
`stride` tokens after the previous one and predicts only what that one did not, so that every token
is predicted once, from at least window - stride preceding tokens (the strided perplexity of Hugging
Face's documentation). A long window is read in pieces through a cache: attention scores for all of
it at once would take memory quadratic in its length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from gpt import flops
from gpt.compile_log import compilations
from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model import kv_cache as kv
from gpt.model import transformer
from gpt.sampling import engine, sampler
from gpt.sampling.completion import require_number
from gpt.sampling.prompts import require_memory, to_ids
from gpt.sharding import on_mesh

ROWS = 8  # windows read together; leftover windows, and those read in pieces, go one by one


@dataclass(frozen=True)
class Score:
    """`logprobs[i]` is log p(token_ids[i] | what precedes it) in nats; the first one follows
    `prefix`, whose text is `before`. If nothing precedes the text, `before` is None and `prefix` is
    the text's own first token, which is not scored. `n_bytes`: the text's length in UTF-8, without
    special tokens; None for a model without a tokenizer. `context`, `stride`: tokens per window,
    and from one window to the next."""

    token_ids: list[int]
    logprobs: list[float]
    n_bytes: int | None
    context: int
    stride: int
    prefix: list[int]
    before: str | None

    @property
    def mean_nll(self) -> float:
        """Mean loss in nats per token."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(mean_nll); infinite if that overflows."""
        return math.inf if self.mean_nll >= 700 else math.exp(self.mean_nll)

    @property
    def bits_per_byte(self) -> float | None:
        """Mean loss in bits per byte; None for an empty text or without a tokenizer."""
        if not self.n_bytes:
            return None
        return -math.fsum(self.logprobs) / math.log(2) / self.n_bytes

    def __str__(self) -> str:
        bits = ""
        if self.bits_per_byte is not None:
            bits = f"{self.bits_per_byte:.4f} bits per byte, "
        first = "its first token not scored" if self.before is None else f"after {self.before!r}"
        return (
            f"{len(self.token_ids)} tokens: {self.mean_nll:.4f} nats per token, {bits}"
            f"perplexity {self.perplexity:.2f} ({first}, context {self.context}, "
            f"stride {self.stride})"
        )

    def to_json(self) -> dict:
        """The score as JSON values."""
        return {
            "tokens": len(self.token_ids),
            "mean_nll": self.mean_nll,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "context": self.context,
            "stride": self.stride,
            "prefix": self.prefix,
            "before": self.before,
        }


def score(
    model, text: str | Sequence[int], stride: int | None = None, window: int | None = None
) -> Score:
    """Score a text, or token ids, with a LanguageModel, preceded by what `model.prefix` puts before
    it; if that is nothing, the first token is not scored.

    `stride`, `window`: see the module docstring (default: half the window; the context). UserError
    if there is nothing to score, if an id, the stride or the window is out of range, if memory does
    not suffice, or if the model's output is NaN.
    """
    config, special = model.config, model.special_ids
    ids = to_ids(model, text)
    prefix = special.prefix(model.prefix, is_needed=True)
    before = model.tokenizer.decode_bytes(prefix).decode("utf-8", "replace") if prefix else None
    if not prefix:
        prefix, ids = ids[:1], ids[1:]
    require(len(ids) > 0, "nothing to score: expected a text of at least one token")

    window = config.context_length if window is None else window
    require(
        1 <= window <= config.context_length,
        f"window is {window}: expected 1 to {config.context_length}, the model's context",
    )
    stride = max(1, window // 2) if stride is None else stride
    require(1 <= stride <= window, f"stride is {stride}: expected 1 to {window}, the window")
    with on_mesh(model.mesh):
        logprobs = score_ids(model, [*prefix, *ids], window, stride)[len(prefix) - 1 :]
    suspect = int(np.isnan(logprobs).argmax())  # the first NaN, if any
    require_number(logprobs[suspect], suspect + 1)

    n_bytes = None
    if len(special.not_text) < model.tokenizer.n_vocab:
        own = [token for token in ids if token not in special.not_text]
        n_bytes = len(model.tokenizer.decode_bytes(own))
    return Score(ids, logprobs.tolist(), n_bytes, window, stride, prefix, before)


def score_ids(model, ids: Sequence[int], window: int, stride: int) -> np.ndarray:
    """Log-probabilities of all `ids` but the first."""
    config = model.config
    sequence = np.asarray(ids, np.int32)
    n = len(ids) - 1
    width = engine.bucket(min(n, window), window)
    rows = ROWS if width <= engine.PIECE else 1
    T = min(width, engine.PIECE)

    # One layer's attention scores and one row's logits, before and after softmax; the cache that a
    # piece reads and the one it writes.
    scores = 8 * rows * config.n_heads * T * width + 8 * T * config.vocab_size
    require_memory(
        model,
        scores + 2 * flops.cache_bytes(config, rows, width),
        f"windows of {width:,} tokens",
        "score in smaller ones (window)",
    )

    # For each window: first token read, and first and end of those predicted.
    windows = []
    predicted = 0
    for i in range(1 + max(0, math.ceil((n - window) / stride))):
        end = min(window + i * stride, n)
        windows.append((i * stride, predicted, end))
        predicted = end

    # Full batches, then the rest one by one: two shapes to compile.
    n_full = len(windows) // rows * rows
    batches = [windows[i : i + rows] for i in range(0, n_full, rows)]
    batches += [[one] for one in windows[n_full:]]
    logprobs = np.empty(n)
    for batch in batches:
        tokens_BT, targets_BT = np.zeros((2, len(batch), width), np.int32)
        for row, (start, _, end) in enumerate(batch):
            tokens_BT[row, : end - start] = sequence[start:end]
            targets_BT[row, : end - start] = sequence[start + 1 : end + 1]
        cache = kv.empty(config, len(batch))
        scored = []
        for at in range(0, width, engine.PIECE):
            piece = slice(at, at + engine.PIECE)
            with compilations.of(batch=len(batch), bucket=width):
                logprobs_BT, cache = target_logprobs(
                    config, model.params, cache, tokens_BT[:, piece], targets_BT[:, piece], width
                )
            scored.append(np.asarray(logprobs_BT))
        scored_BT = np.concatenate(scored, axis=1)
        for row, (start, done, end) in enumerate(batch):
            logprobs[done:end] = scored_BT[row, done - start : end - start]
    return logprobs


@partial(jax.jit, static_argnames=("config", "width"))
def target_logprobs(
    config: ModelConfig, params: dict, cache: kv.KVCache, tokens_BT, targets_BT, width: int
):
    """log p(targets_BT) after reading tokens_BT up to each position on top of `cache`, and the
    cache for the next piece if tokens_BT is shorter than `width`.

    Logits are computed for one row at a time: those of all would be larger than the model.
    """
    model = transformer.bind(config, params)
    T = tokens_BT.shape[1]
    if width == T:  # all in one piece: no cache is needed
        x_BTD, _ = model.hidden(tokens_BT)
    else:
        x_BTD, cache = model.hidden(tokens_BT, cache)
        cache = kv.grow(cache, width).advanced(T)

    def score_row(row):
        x_TD, targets_T = row
        return sampler.token_logprob(model.unembed(x_TD), targets_T)

    return jax.lax.map(score_row, (x_BTD, targets_BT)), cache
