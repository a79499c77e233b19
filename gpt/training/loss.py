"""Cross-entropy over the vocabulary, a chunk of its rows at a time.

Many float32 logits never exist at once, a chunk's are computed again in the backward pass: for
GPT-2 they would take as much memory as all else together.
Chunks are of vocabulary rows and not of tokens, so that the gradient of a sharded embedding table
is reduced across devices once and not once a chunk.
"""

import math

import jax
import jax.numpy as jnp

from gpt import sharding
from gpt.config import ModelConfig, TrainConfig
from gpt.model import transformer

CHUNK_ROWS = 16_384  # most vocabulary rows at once
KEPT_LOGITS = 2**25  # most logits kept for the backward pass (128 MiB), not computed again


def count_chunks(rows: int) -> int:
    """Fewest equal chunks, a power of two, of at most CHUNK_ROWS rows."""
    n = 1
    while rows // n > CHUNK_ROWS:
        n *= 2
    return n


def recomputes_logits(n_tokens: int, vocabulary: int) -> bool:
    """Whether the logits of so many tokens are too many to be kept for the backward pass."""
    return n_tokens * vocabulary > KEPT_LOGITS


def token_losses(config: ModelConfig, params: dict, x_MD: jax.Array, target_M: jax.Array):
    """Of each token, float32 in nats: -log p(target), the log of the softmax's denominator, and
    the mean of -log p over the vocabulary."""
    table_VD = transformer.head_table(params)
    V, n = len(table_VD), count_chunks(len(table_VD))
    # A chunk has its share of each device's rows, so that none are sent; of one device, a slice.
    rows = V // n // math.gcd(V // n, sharding.count_parts("vocab"))

    def cut(x: jax.Array) -> jax.Array:
        """[V, ...] in n chunks."""
        parts = x.reshape(-1, n, rows, *x.shape[1:]).swapaxes(0, 1)
        return parts.reshape(n, V // n, *x.shape[1:])

    def add_chunk(sums, chunk):
        """Running max, sum of exp, target's logit and sum of logits (online softmax, Milakov &
        Gimelshein 2018)."""
        top_M, total_M, hit_M, sum_M = sums
        rows_CD, ids_C, c = chunk
        logits_MC = transformer.unembed_rows(config, x_MD, rows_CD, ids_C)
        new_M = jax.lax.stop_gradient(jnp.maximum(top_M, logits_MC.max(-1)))
        total_M = total_M * jnp.exp(top_M - new_M) + jnp.exp(logits_MC - new_M[:, None]).sum(-1)
        mine_M = target_M // rows % n == c
        place_M = target_M // (n * rows) * rows + target_M % rows
        logit_M = jnp.take_along_axis(logits_MC, place_M[:, None], axis=-1)[:, 0]
        sum_M += jnp.where(ids_C < config.vocab_size, logits_MC, 0).sum(-1)
        return (new_M, total_M, hit_M + jnp.where(mine_M, logit_M, 0), sum_M), None

    if recomputes_logits(len(x_MD), V):
        add_chunk = jax.checkpoint(add_chunk)
    zero_M = jnp.zeros(len(x_MD), jnp.float32)
    start = (zero_M + transformer.MASKED, zero_M, zero_M, zero_M)
    chunks = cut(table_VD), cut(jnp.arange(V)), jnp.arange(n)
    (top_M, total_M, hit_M, sum_M), _ = jax.lax.scan(add_chunk, start, chunks)
    log_total_M = top_M + jnp.log(total_M)
    return log_total_M - hit_M, log_total_M, log_total_M - sum_M / config.vocab_size


def sequence_losses(
    config: ModelConfig, params: dict, tokens_BU: jax.Array, key_B=None, remat: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`token_losses`, each [B, T], of predicting tokens 1..T from tokens 0..T-1 (U = T + 1)."""
    inputs_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
    x_BTD, _ = transformer.hidden(config, params, inputs_BT, key_B=key_B, remat=remat)
    losses = token_losses(config, params, x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.ravel())
    return tuple(loss_M.reshape(targets_BT.shape) for loss_M in losses)


def objective(config: TrainConfig, params: dict, tokens_BU: jax.Array, key_B=None):
    """What training minimises, a mean over tokens, and the plain cross-entropy in nats.

    (1-e) of the loss on the target plus e of the mean over the vocabulary (label smoothing,
    Szegedy et al. 2016), plus z log²(sum of exp) (z-loss, Chowdhery et al. 2022, section 5).
    """
    loss_BT, log_total_BT, even_BT = sequence_losses(
        config.model, params, tokens_BU, key_B, config.remat
    )
    aim_BT, e = loss_BT, config.label_smoothing
    if e:
        aim_BT = (1 - e) * loss_BT + e * even_BT
    if config.z_loss:
        aim_BT += config.z_loss * log_total_BT**2
    return aim_BT.mean(), loss_BT.mean()
