"""The loss of training on CPUs and of every evaluation, computed in chunks of the vocabulary.

Training on accelerators uses fused_loss.py.

The float32 logits of all tokens never exist together: for GPT-2 they would take as much memory as
everything else. When there are many, each chunk's logits are recomputed in the backward pass.
Chunks are rows of the vocabulary, not tokens, so the gradient of a sharded embedding table is
reduced across devices once instead of once per chunk.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from gpt import sharding
from gpt.config import TrainConfig
from gpt.model import attention, flash_attention, transformer
from gpt.model.attention import MASKED
from gpt.model.transformer import GPT, Attend

CHUNK_ROWS = 16_384  # maximum vocabulary rows per chunk
KEPT_LOGITS = 2**25  # maximum kept for the backward pass (128 MiB); more are recomputed


def count_chunks(rows: int) -> int:
    """The smallest power of two that makes equal chunks of at most CHUNK_ROWS rows."""
    n = 1
    while rows // n > CHUNK_ROWS:
        n *= 2
    return n


# The vocabulary is split into chunks by stripes of consecutive rows: stripe s belongs to chunk
# s % n_chunks. If the table is sharded over several devices, each of them holds its share of every
# chunk, so no rows are sent. With 8 rows, 2 chunks and stripes of 2 rows, chunk 0 has rows 0, 1, 4,
# 5 and chunk 1 has rows 2, 3, 6, 7. On one device a chunk is a single stripe.


def split_into_chunks(x: jax.Array, n_chunks: int, stripe: int) -> jax.Array:
    """[V, ...] as [n_chunks, V / n_chunks, ...]."""
    stripes = x.reshape(-1, n_chunks, stripe, *x.shape[1:]).swapaxes(0, 1)
    return stripes.reshape(n_chunks, -1, *x.shape[1:])


def find_in_chunks(row: jax.Array, n_chunks: int, stripe: int) -> tuple[jax.Array, jax.Array]:
    """The chunk into which `split_into_chunks` puts each vocabulary row, and its place there."""
    chunk = row // stripe % n_chunks
    place = row // (n_chunks * stripe) * stripe + row % stripe
    return chunk, place


def token_loss_terms(
    model: GPT, x_MD: jax.Array, target_M: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per-token values, float32, in nats: -log p(target), the log of the softmax's denominator, and
    the mean of -log p over the vocabulary."""
    config = model.config
    table_VD = model.head_table
    V = len(table_VD)
    n_chunks = count_chunks(V)
    stripe = V // n_chunks // math.gcd(V // n_chunks, sharding.count_parts("vocab"))
    target_chunk_M, target_place_M = find_in_chunks(target_M, n_chunks, stripe)

    def add_chunk(sums, chunk):
        """One step of the online softmax (Milakov & Gimelshein 2018)."""
        running_max_M, running_sum_M, target_logit_M, logit_sum_M = sums
        rows_CD, ids_C, chunk_number = chunk
        logits_MC = transformer.table_logits(config, x_MD, rows_CD, ids_C)

        new_max_M = jax.lax.stop_gradient(jnp.maximum(running_max_M, logits_MC.max(-1)))
        running_sum_M = running_sum_M * jnp.exp(running_max_M - new_max_M)
        running_sum_M = running_sum_M + jnp.exp(logits_MC - new_max_M[:, None]).sum(-1)
        logit_sum_M += jnp.where(ids_C < config.vocab_size, logits_MC, 0).sum(-1)

        # The target's logit, if its row is in this chunk.
        logit_M = jnp.take_along_axis(logits_MC, target_place_M[:, None], axis=-1)[:, 0]
        target_logit_M += jnp.where(target_chunk_M == chunk_number, logit_M, 0)
        return (new_max_M, running_sum_M, target_logit_M, logit_sum_M), None

    if len(x_MD) * V > KEPT_LOGITS:
        add_chunk = jax.checkpoint(add_chunk)
    zero_M = jnp.zeros(len(x_MD), jnp.float32)
    start = (zero_M + MASKED, zero_M, zero_M, zero_M)
    chunks = (
        split_into_chunks(table_VD, n_chunks, stripe),
        split_into_chunks(jnp.arange(V), n_chunks, stripe),
        jnp.arange(n_chunks),
    )
    (max_M, sum_M, target_logit_M, logit_sum_M), _ = jax.lax.scan(add_chunk, start, chunks)

    log_normalizer_M = max_M + jnp.log(sum_M)
    smoothing_loss_M = log_normalizer_M - logit_sum_M / config.vocab_size
    return log_normalizer_M - target_logit_M, log_normalizer_M, smoothing_loss_M


def hidden_states_and_targets(
    config: TrainConfig,
    model: GPT,
    tokens_BU: jax.Array,
    dropout_key_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The hidden states [M, D] at tokens 0..T-1 (U = T + 1), and the tokens 1..T [M] to predict."""
    x_BTD, _ = model.hidden(
        tokens_BU[:, :-1],
        dropout_key_B=dropout_key_B,
        attend=attention_for(config),
        remat=config.remat,
        unroll=config.unroll,
    )
    return x_BTD.reshape(-1, x_BTD.shape[-1]), tokens_BU[:, 1:].ravel()


def attention_for(config: TrainConfig) -> Attend:
    """The attention function that the config selects."""
    if config.attention == "plain":
        return attention.plain_attention
    return partial(flash_attention.fused_attention, deterministic=config.deterministic)


def add_regularizers(
    config: TrainConfig,
    loss: jax.Array,
    log_normalizer: jax.Array,
    smoothing_loss: jax.Array | None,
) -> jax.Array:
    """The training objective per token, from the three values that `token_loss_terms` returns;
    `smoothing_loss` may be None without label smoothing.

    (1 - e) loss + e smoothing_loss (label smoothing, Szegedy et al. 2016), plus z log_normalizer²
    (z-loss, Chowdhery et al. 2022, section 5).
    """
    smoothing = config.label_smoothing
    minimized = loss
    if smoothing:
        minimized = (1 - smoothing) * loss + smoothing * smoothing_loss
    if config.z_loss:
        minimized += config.z_loss * log_normalizer**2
    return minimized
