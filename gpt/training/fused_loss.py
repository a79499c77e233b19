"""The training objective and its gradient in one pass over the logits, for accelerators.

Tokens are processed in chunks. While a chunk's logits are in memory, their gradient is multiplied
into the gradients of the hidden states and of the head's table (Hsu et al. 2024, Liger Kernel,
section 3.2), so each logit is computed once. The backward pass only scales these two gradients.
Logits are stored in the compute dtype and summed in float32.

If the table is sharded, each device has the logits of its own rows of the vocabulary, and the
softmax's maximum and sum are reduced over the devices.
Shape letters as in gpt/model/transformer.py; here M tokens on a device, C tokens in a chunk, V
table rows on a device.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gpt import sharding
from gpt.config import TrainConfig
from gpt.model.attention import MASKED
from gpt.model.layers import exact_products, softcap
from gpt.training.loss import add_regularizers

LOGITS_BYTES = 2**29  # maximum for a chunk on one device; their gradient takes as much again

Means = tuple[jax.Array, jax.Array]
# The mesh axes over which tokens, the table's rows and its width are sharded.
Axes = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def objective_and_loss(
    config: TrainConfig, x_MD: jax.Array, table_VD: jax.Array, target_M: jax.Array
) -> Means:
    """What training minimizes, and the plain cross-entropy in nats: float32 means over all tokens.
    Only the first is differentiable.

    `x_MD`: hidden states in the compute dtype. `table_VD`: the padded head.
    """
    means, _ = objective_loss_and_gradients(config, x_MD, table_VD, target_M)
    return means


def scale_gradients(config, gradients, cotangents):
    """The backward pass: scale the gradients that the forward pass has computed."""
    scale, _ = cotangents
    scaled = [(gradient * scale).astype(gradient.dtype) for gradient in gradients]
    return *scaled, None


def objective_loss_and_gradients(
    config: TrainConfig, x_MD: jax.Array, table_VD: jax.Array, target_M: jax.Array
) -> tuple[Means, tuple[jax.Array, jax.Array]]:
    """`objective_and_loss`, and the objective's gradients with respect to `x_MD` and `table_VD`,
    each in its array's dtype."""
    axes = tuple(map(sharding.split_over, ("batch", "vocab", "embed")))
    on_device = functools.partial(device_losses, config, axes, len(x_MD))
    mesh = sharding.mesh_in_force()
    if mesh is None:
        return on_device(x_MD, table_VD, target_M)
    x_spec = sharding.fitting(mesh, x_MD.shape, ("batch", None))
    table_spec = sharding.fitting(mesh, table_VD.shape, ("vocab", "embed"))
    target_spec = sharding.fitting(mesh, target_M.shape, ("batch",))
    replicated = jax.sharding.PartitionSpec()
    return jax.shard_map(
        on_device,
        in_specs=(x_spec, table_spec, target_spec),
        out_specs=((replicated, replicated), (x_spec, table_spec)),
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )(x_MD, table_VD, target_M)


objective_and_loss.defvjp(objective_loss_and_gradients, scale_gradients)


def device_losses(
    config: TrainConfig,
    axes: Axes,
    n_tokens: int,
    x_MD: jax.Array,
    table_VD: jax.Array,
    target_M: jax.Array,
) -> tuple[Means, tuple[jax.Array, jax.Array]]:
    """`objective_loss_and_gradients` for one device's tokens and table shard; `n_tokens` is the
    global count."""
    token_axes, vocab_axes, embed_axes = axes
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    # The table in the compute dtype, gathered to its full width.
    table_type = table_VD.dtype
    table_VD = table_VD.astype(x_MD.dtype)
    if embed_axes:
        table_VD = jax.lax.all_gather(table_VD, embed_axes, axis=1, tiled=True)
    V = len(table_VD)
    first_id = V * jax.lax.axis_index(vocab_axes) if vocab_axes else 0
    ids_V = first_id + jnp.arange(V)

    # The number of equal chunks is a power of two, which divides most batches; otherwise the last
    # chunk is padded with tokens that do not count.
    M, D = x_MD.shape
    n_chunks = 1
    while M * V * x_MD.dtype.itemsize > n_chunks * LOGITS_BYTES:
        n_chunks *= 2
    C = math.ceil(M / n_chunks)
    padding = n_chunks * C - M
    counts_M = jnp.arange(M + padding) < M
    chunks = (
        jnp.pad(x_MD, ((0, padding), (0, 0))).reshape(n_chunks, C, D),
        jnp.pad(target_M, (0, padding)).reshape(n_chunks, C),
        counts_M.reshape(n_chunks, C),
    )

    def add_chunk(sums, chunk):
        objective_sum, loss_sum, table_gradient_VD = sums
        x_CD, target_C, counts_C = chunk

        # Before softcap, in the compute dtype.
        raw_logits_CV = jnp.einsum("CD,VD->CV", x_CD, table_VD)
        objective_C, loss_C, gradient_CV = chunk_losses(
            config, vocab_axes, raw_logits_CV, target_C - first_id, ids_V
        )
        objective_sum += jnp.where(counts_C, objective_C, 0).sum()
        loss_sum += jnp.where(counts_C, loss_C, 0).sum()

        gradient_CV = jnp.where(counts_C[:, None], gradient_CV / n_tokens, 0).astype(x_CD.dtype)
        x_gradient_CD = product("CV,VD->CD", gradient_CV, table_VD).astype(x_CD.dtype)
        table_gradient_VD += product("CV,CD->VD", gradient_CV, x_CD)
        return (objective_sum, loss_sum, table_gradient_VD), x_gradient_CD

    zero = jnp.zeros(())
    with exact_products(config.model.compute_dtype):
        (objective, loss, table_gradient_VD), x_gradient = jax.lax.scan(
            add_chunk, (zero, zero, jnp.zeros((V, D))), chunks
        )

    # Sum over the devices that hold other tokens, or other rows of the vocabulary.
    means = jax.lax.psum((objective / n_tokens, loss / n_tokens), token_axes)
    if embed_axes:
        table_gradient_VD = jax.lax.psum_scatter(
            table_gradient_VD, embed_axes, scatter_dimension=1, tiled=True
        )
    others = tuple(axis for axis in token_axes if axis not in embed_axes)
    table_gradient_VD = jax.lax.psum(table_gradient_VD, others).astype(table_type)
    x_gradient_MD = jax.lax.psum(x_gradient.reshape(-1, D)[:M], vocab_axes)
    return means, (x_gradient_MD, table_gradient_VD)


def chunk_losses(
    config: TrainConfig,
    vocab_axes: tuple[str, ...],
    raw_logits_CV: jax.Array,
    target_C: jax.Array,
    ids_V: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The objective and the cross-entropy in nats for each token of a chunk, and the objective's
    gradient with respect to the raw logits; all float32.

    `vocab_axes`: the mesh axes over which the table's rows are sharded. `target_C`: row numbers in
    this device's table shard, out of range if another device has the row. `ids_V`: the token ids of
    the rows; padding rows have ids beyond the vocabulary.
    """
    cap = config.model.logit_softcap
    smoothing = config.label_smoothing
    vocab_size = config.model.vocab_size
    is_token_V = ids_V < vocab_size

    logits_CV = softcap(raw_logits_CV.astype(jnp.float32), cap)
    logits_CV = jnp.where(is_token_V, logits_CV, MASKED)

    max_C = logits_CV.max(-1)
    if vocab_axes:
        max_C = jax.lax.pmax(max_C, vocab_axes)
    sum_C = jax.lax.psum(jnp.exp(logits_CV - max_C[:, None]).sum(-1), vocab_axes)
    log_normalizer_C = max_C + jnp.log(sum_C)

    V = len(ids_V)
    is_here_C = (target_C >= 0) & (target_C < V)
    place_C = jnp.clip(target_C, 0, V - 1)
    target_logit_C = jnp.take_along_axis(raw_logits_CV, place_C[:, None], axis=-1)[:, 0]
    target_logit_C = softcap(target_logit_C.astype(jnp.float32), cap)
    target_logit_C = jax.lax.psum(jnp.where(is_here_C, target_logit_C, 0), vocab_axes)

    loss_C = log_normalizer_C - target_logit_C
    smoothing_loss_C = None
    if smoothing:
        logit_sum_C = jax.lax.psum(jnp.where(is_token_V, logits_CV, 0).sum(-1), vocab_axes)
        smoothing_loss_C = log_normalizer_C - logit_sum_C / vocab_size
    objective_C = add_regularizers(config, loss_C, log_normalizer_C, smoothing_loss_C)

    # The derivative of the loss is the probability p, minus 1 at the target. A comparison finds the
    # target, since a scatter into all logits would cost more.
    p_CV = jnp.exp(logits_CV - log_normalizer_C[:, None])
    is_target_CV = jnp.arange(V) == target_C[:, None]
    gradient_CV = p_CV - (1 - smoothing) * is_target_CV
    if smoothing:
        gradient_CV -= smoothing / vocab_size * is_token_V
    if config.z_loss:
        gradient_CV += (2 * config.z_loss * log_normalizer_C)[:, None] * p_CV
    if cap:
        gradient_CV *= jnp.where(is_token_V, 1 - (logits_CV / cap) ** 2, 0)
    return objective_C, loss_C, gradient_CV
