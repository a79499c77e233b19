"""The loss that training minimizes together with its gradient, in one pass over the logits.

For accelerators. A chunk of tokens at a time, each logit is computed once, and while a chunk's
logits are in memory, their gradient is multiplied into the gradients of the hidden states and of
the head's table (Hsu et al. 2024, Liger Kernel, section 3.2). The backward pass only scales these
two. Logits are kept in the type of the products; sums are in float32.

With a table split over several devices each has the logits of its own rows of the vocabulary, and
softmax's maximum and sum are taken over all of them.
Shape letters as in gpt/model/transformer.py; here M the tokens on a device, C those of a chunk, V
the rows of the table on a device.
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

LOGITS_BYTES = 2**29  # at most, for one chunk on a device; their gradient takes the same again

Means = tuple[jax.Array, jax.Array]
# The axes of the mesh over which tokens, the table's rows and its width are split.
Axes = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def objective_and_loss(
    config: TrainConfig, x_MD: jax.Array, table_VD: jax.Array, target_M: jax.Array
) -> Means:
    """What training minimizes and the plain cross-entropy in nats, means over all tokens, float32.
    Only the first is differentiable.

    `x_MD`: hidden states in the type of the products. `table_VD`: the head, padded.
    """
    means, _ = losses_and_gradients(config, x_MD, table_VD, target_M)
    return means


def scale_gradients(config, gradients, cotangents):
    scale, _ = cotangents
    scaled = [(gradient * scale).astype(gradient.dtype) for gradient in gradients]
    return *scaled, None


def losses_and_gradients(
    config: TrainConfig, x_MD: jax.Array, table_VD: jax.Array, target_M: jax.Array
) -> tuple[Means, tuple[jax.Array, jax.Array]]:
    """`objective_and_loss`, and the gradients of the first of them with respect to `x_MD` and
    `table_VD`, each in the type of its array."""
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


objective_and_loss.defvjp(losses_and_gradients, scale_gradients)


def device_losses(
    config: TrainConfig,
    axes: Axes,
    n_tokens: int,
    x_MD: jax.Array,
    table_VD: jax.Array,
    target_M: jax.Array,
) -> tuple[Means, tuple[jax.Array, jax.Array]]:
    """`losses_and_gradients` on one device, of its tokens, `n_tokens` on all devices together, and
    its part of the table."""
    tokens, vocab, embed = axes
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    # The table in the type of the products, whole in width.
    table_type = table_VD.dtype
    table_VD = table_VD.astype(x_MD.dtype)
    if embed:
        table_VD = jax.lax.all_gather(table_VD, embed, axis=1, tiled=True)
    V = len(table_VD)
    first_id = V * jax.lax.axis_index(vocab) if vocab else 0
    ids_V = first_id + jnp.arange(V)

    # Chunks of equal length, a power of two of them, since that divides most batches; where it does
    # not, the last one is filled up with tokens that do not count.
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

        # Kept in the type of the products; everything below reads them from there.
        kept_CV = jnp.einsum("CD,VD->CV", x_CD, table_VD)
        objective_C, loss_C, gradient_CV = chunk_losses(
            config, vocab, kept_CV, target_C - first_id, ids_V
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

    # Summed over the devices that have other tokens, or other rows of the vocabulary.
    means = jax.lax.psum((objective / n_tokens, loss / n_tokens), tokens)
    if embed:
        table_gradient_VD = jax.lax.psum_scatter(
            table_gradient_VD, embed, scatter_dimension=1, tiled=True
        )
    others = tuple(axis for axis in tokens if axis not in embed)
    table_gradient_VD = jax.lax.psum(table_gradient_VD, others).astype(table_type)
    x_gradient_MD = jax.lax.psum(x_gradient.reshape(-1, D)[:M], vocab)
    return means, (x_gradient_MD, table_gradient_VD)


def chunk_losses(
    config: TrainConfig,
    vocab: tuple[str, ...],
    kept_CV: jax.Array,
    target_C: jax.Array,
    ids_V: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token of a chunk what training minimizes and the cross-entropy in nats, and the
    gradient of the former with respect to the kept logits; all float32.

    `vocab`: the axes of the mesh over which the table's rows are split. `target_C`: rows of this
    device's part of the table, outside of it if they are another device's. `ids_V`: the tokens
    whose logits these are; those of padding are beyond the vocabulary.
    """
    cap = config.model.logit_softcap
    smoothing = config.label_smoothing
    vocab_size = config.model.vocab_size
    is_token_V = ids_V < vocab_size

    logits_CV = softcap(kept_CV.astype(jnp.float32), cap)
    logits_CV = jnp.where(is_token_V, logits_CV, MASKED)

    max_C = logits_CV.max(-1)
    if vocab:
        max_C = jax.lax.pmax(max_C, vocab)
    sum_C = jax.lax.psum(jnp.exp(logits_CV - max_C[:, None]).sum(-1), vocab)
    log_total_C = max_C + jnp.log(sum_C)

    V = len(ids_V)
    is_here_C = (target_C >= 0) & (target_C < V)
    place_C = jnp.clip(target_C, 0, V - 1)
    target_logit_C = jnp.take_along_axis(kept_CV, place_C[:, None], axis=-1)[:, 0]
    target_logit_C = softcap(target_logit_C.astype(jnp.float32), cap)
    target_logit_C = jax.lax.psum(jnp.where(is_here_C, target_logit_C, 0), vocab)

    loss_C = log_total_C - target_logit_C
    uniform_C = None
    if smoothing:
        logit_sum_C = jax.lax.psum(jnp.where(is_token_V, logits_CV, 0).sum(-1), vocab)
        uniform_C = log_total_C - logit_sum_C / vocab_size
    objective_C = add_regularizers(config, loss_C, log_total_C, uniform_C)

    # The derivative of the loss in terms of the probabilities p: p itself, less 1 at the target.
    # A comparison finds the target: a scatter into all logits would cost more.
    p_CV = jnp.exp(logits_CV - log_total_C[:, None])
    is_target_CV = jnp.arange(V) == target_C[:, None]
    gradient_CV = p_CV - (1 - smoothing) * is_target_CV
    if smoothing:
        gradient_CV -= smoothing / vocab_size * is_token_V
    if config.z_loss:
        gradient_CV += (2 * config.z_loss * log_total_C)[:, None] * p_CV
    if cap:
        gradient_CV *= jnp.where(is_token_V, 1 - (logits_CV / cap) ** 2, 0)
    return objective_C, loss_C, gradient_CV
