"""Causal attention for CPUs, computed in blocks of queries with a hand-written gradient.

A block of queries reads only the slots up to its last query; the rest would be masked. The backward
pass recomputes the weights from each query's log-sum-exp. It takes the softmax gradient from sums
over the head width instead of over all slots (Dao et al. 2022, FlashAttention, appendix B.4), since
sums over all slots are long, and slow on a CPU.
Shape letters are defined in transformer.py; C is the queries in a block, S the slots it reads.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from gpt.model.attention import MASKED

N_BLOCKS = 4  # more would skip more slots, but take longer to compile
SHORTEST = 256  # tokens in the shortest sequence for which this beats plain attention

product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def fits(n_tokens: int, width: int, dtype: jnp.dtype) -> bool:
    """Whether the sequence is long enough and splits into equal blocks; any head width and dtype
    fits."""
    return n_tokens >= SHORTEST and n_tokens % N_BLOCKS == 0


def split(T: int) -> list[slice]:
    """Each block's queries."""
    C = T // N_BLOCKS
    return [slice(start, start + C) for start in range(0, T, C)]


@jax.custom_vjp
def by_blocks(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """Same as `plain_attention` with `pos_BT` None, for a length that `fits`."""
    mix_BTNH, _ = forward(q_BTNH, k_BKSH, v_BKSH)
    return mix_BTNH


def scores(q_BKGTH: jax.Array, k_BKSH: jax.Array, block: slice) -> jax.Array:
    """Masked float32 scores [B, K, G, C, S] of one block of already scaled queries."""
    q_BKGCH = q_BKGTH[:, :, :, block]
    k_BKSH = k_BKSH[:, :, : block.stop]
    scores_BKGCS = product("BKGCH,BKSH->BKGCS", q_BKGCH, k_BKSH)
    visible_CS = jnp.arange(block.stop) <= jnp.arange(block.start, block.stop)[:, None]
    return jnp.where(visible_CS, scores_BKGCS, MASKED)


def forward(q_BTNH, k_BKSH, v_BKSH):
    """The attention output, and the residuals for the backward pass."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    q_BKGTH = (q_BKGTH / math.sqrt(H)).astype(q_BTNH.dtype)
    mixes, log_sums = [], []
    for block in split(T):
        scores_BKGCS = scores(q_BKGTH, k_BKSH, block)
        max_BKGC1 = scores_BKGCS.max(-1, keepdims=True)
        weights_BKGCS = jnp.exp(scores_BKGCS - max_BKGC1)
        sum_BKGC1 = weights_BKGCS.sum(-1, keepdims=True)
        weights_BKGCS = weights_BKGCS.astype(v_BKSH.dtype)
        mix_BKGCH = product("BKGCS,BKSH->BKGCH", weights_BKGCS, v_BKSH[:, :, : block.stop])
        mixes.append(mix_BKGCH / sum_BKGC1)
        log_sums.append(max_BKGC1 + jnp.log(sum_BKGC1))
    mix_BKGTH = jnp.concatenate(mixes, axis=3)
    log_sum_BKGT1 = jnp.concatenate(log_sums, axis=3)
    mix_BTNH = mix_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(v_BKSH.dtype)
    return mix_BTNH, (q_BKGTH, k_BKSH, v_BKSH, mix_BKGTH, log_sum_BKGT1)


def backward(kept, grad_BTNH):
    """Gradients with respect to q_BTNH, k_BKSH and v_BKSH.

    With weights P = softmax(scores) and their gradient dP, the gradient of the scores is
    P * (dP - sum over slots of P * dP). That sum equals mix . grad.
    """
    q_BKGTH, k_BKSH, v_BKSH, mix_BKGTH, log_sum_BKGT1 = kept
    B, K, G, T, H = q_BKGTH.shape
    grad_BKGTH = grad_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    row_sum_BKGT1 = (mix_BKGTH * grad_BKGTH).sum(-1, keepdims=True)

    q_grads = []
    k_grad_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
    v_grad_BKSH = jnp.zeros(v_BKSH.shape, jnp.float32)
    for block in split(T):
        q_BKGCH = q_BKGTH[:, :, :, block]
        grad_BKGCH = grad_BKGTH[:, :, :, block]
        scores_BKGCS = scores(q_BKGTH, k_BKSH, block)
        weights_BKGCS = jnp.exp(scores_BKGCS - log_sum_BKGT1[:, :, :, block])
        weight_grads_BKGCS = product("BKGCH,BKSH->BKGCS", grad_BKGCH, v_BKSH[:, :, : block.stop])
        score_grads_BKGCS = weights_BKGCS * (weight_grads_BKGCS - row_sum_BKGT1[:, :, :, block])

        score_grads_BKGCS = score_grads_BKGCS.astype(q_BKGTH.dtype)
        weights_BKGCS = weights_BKGCS.astype(q_BKGTH.dtype)
        q_grads.append(product("BKGCS,BKSH->BKGCH", score_grads_BKGCS, k_BKSH[:, :, : block.stop]))
        k_grad_of_block_BKSH = product("BKGCS,BKGCH->BKSH", score_grads_BKGCS, q_BKGCH)
        v_grad_of_block_BKSH = product("BKGCS,BKGCH->BKSH", weights_BKGCS, grad_BKGCH)
        k_grad_BKSH = k_grad_BKSH.at[:, :, : block.stop].add(k_grad_of_block_BKSH)
        v_grad_BKSH = v_grad_BKSH.at[:, :, : block.stop].add(v_grad_of_block_BKSH)
    q_grad_BKGTH = jnp.concatenate(q_grads, axis=3) / math.sqrt(H)
    q_grad_BTNH = q_grad_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
    return (
        q_grad_BTNH.astype(q_BKGTH.dtype),
        k_grad_BKSH.astype(k_BKSH.dtype),
        v_grad_BKSH.astype(v_BKSH.dtype),
    )


by_blocks.defvjp(forward, backward)
