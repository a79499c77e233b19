"""Fused attention: the platform's kernel instead of plain einsums, if one fits.

The scores of all token pairs, which the plain form writes to memory and reads back, never leave the
chip (Dao et al. 2022, FlashAttention). A kernel is used in training and for reading prompts, where
`pos_BT` is None (positions.Positions), without dropout of attention weights; accelerators also
require bfloat16. The choice is made at trace time, from the target devices. CPUs have no such
kernel; long sequences are computed in blocks there (blockwise_attention.py).
Shape letters are defined in transformer.py.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt.model import attention, blockwise_attention
from gpt.sharding import fitting, mesh_in_force, platform, target_device

try:  # what jax.nn.dot_product_attention calls; not public, but it accepts our layout
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:
    cudnn = None

Kernel = Callable[..., jax.Array]  # takes q_BTNH, k_BKSH, v_BKSH
BEFORE_AMPERE = re.compile(r"Tesla|TITAN|Quadro|GTX|MX\d|RTX 20\d0|Xavier|\b[KMPVT]\d")
HOPPER_OR_LATER = re.compile(r"\bG?[HB]\d")  # data center GPUs
TILES = (512, 256, 128)  # tokens per tile on a TPU; the largest that divides the sequence is used


def fused_attention(
    q_BTNH, k_BKSH, v_BKSH, pos_BT=None, drop=None, *, deterministic: bool = False
) -> jax.Array:
    """Same as `plain_attention`, using the platform's kernel if one fits.

    `deterministic`: whether the run uses --deterministic (explained in `kernel_for`).
    """
    kernel = kernel_for(q_BTNH, deterministic)
    if kernel is None or pos_BT is not None or drop is not None:
        return attention.plain_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop)
    return on_each_device(kernel, q_BTNH, k_BKSH, v_BKSH)


def prompt_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop) -> jax.Array:
    """Same as `fused_attention`, for a prompt whose keys and values become the cache. cuDNN reads
    them in the cache's layout, so they are written only once."""
    if cudnn is not None and pos_BT is None and kernel_for(q_BTNH) is by_cudnn:
        return on_each_device(cudnn_on_cache_layout, q_BTNH, k_BKSH, v_BKSH)
    return fused_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop)


def decode_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop) -> jax.Array:
    """Same as `plain_attention`, for a decode step: all T queries of a row are copies of one token.

    They all get the first one's result. A single row is left to the plain form, because it has too
    few heads for the kernel to keep a GPU busy.
    """
    if cudnn is not None and len(q_BTNH) > 1 and kernel_for(q_BTNH) is by_cudnn:
        # A full row's position is one past the last slot.
        n_B = jnp.minimum(pos_BT[:, 0] + 1, k_BKSH.shape[2])
        return on_each_device(cudnn_on_cache_layout, q_BTNH, k_BKSH, v_BKSH, n_B)
    mix_B1NH = attention.plain_attention(q_BTNH[:, :1], k_BKSH, v_BKSH, pos_BT[:, :1], drop)
    return jnp.broadcast_to(mix_B1NH, q_BTNH.shape)


def kernel_for(
    q_BTNH: jax.Array | jax.ShapeDtypeStruct, deterministic: bool = False
) -> Kernel | None:
    """The platform's kernel for queries of this shape and dtype, or None.

    A deterministic run on a GPU uses the CPU's form: matrix products in blocks of queries. With its
    determinism flag, XLA compiles cuDNN's gradient but cannot run it, because it looks up the
    kernel under a different key than it was stored with (jax 0.11.2 on an H200;
    github.com/openxla/xla/pull/46500).
    """
    kind = platform()
    if deterministic and kind == "gpu":
        kind = "cpu"
    kernel, fits = KERNELS.get(kind, (None, None))
    if kernel is None or not fits(q_BTNH.shape[1], q_BTNH.shape[3], q_BTNH.dtype):
        return None
    return kernel


def on_each_device(
    kernel: Kernel, q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *per_row
):
    """Run `kernel` on each device's rows and heads; the compiler cannot partition a kernel itself.

    `per_row`: further arrays for the kernel, with one entry per row.
    """
    mesh = mesh_in_force()
    if mesh is None:
        return kernel(q_BTNH, k_BKSH, v_BKSH, *per_row)
    q_spec = fitting(mesh, q_BTNH.shape, ("batch", None, "heads", None))
    kv_spec = fitting(mesh, k_BKSH.shape, ("batch", "kv_heads", None, None))
    if kv_spec[1] != q_spec[2]:  # too few key/value heads to shard: repeat one per query head
        groups = q_BTNH.shape[2] // k_BKSH.shape[1]
        k_BKSH, v_BKSH = (jnp.repeat(a, groups, axis=1) for a in (k_BKSH, v_BKSH))
        kv_spec = fitting(mesh, k_BKSH.shape, ("batch", "heads", None, None))
    row_specs = [fitting(mesh, array_B.shape, ("batch",)) for array_B in per_row]
    on_device = jax.shard_map(
        kernel,
        in_specs=(q_spec, kv_spec, kv_spec, *row_specs),
        out_specs=q_spec,
        axis_names=set(mesh.auto_axes),
        check_vma=False,  # a kernel does not declare which mesh axes its result varies over
    )
    return on_device(q_BTNH, k_BKSH, v_BKSH, *per_row)


def by_cudnn(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """cuDNN's kernel, for NVIDIA GPUs."""
    k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn"
    )


def cudnn_on_cache_layout(q_BTNH, k_BKSH, v_BKSH, n_B: jax.Array | None = None) -> jax.Array:
    """Same as `by_cudnn`, but reads keys and values in the cache's layout, without transposing.

    With `n_B`, all queries of row b see its first `n_B[b]` slots instead of those up to their own.
    """
    B, T, _, H = q_BTNH.shape
    options = {"mask_type": cudnn.MaskType.CAUSAL}
    if n_B is not None:
        options = {
            "mask_type": cudnn.MaskType.PADDING,
            "q_seqlen": jnp.full(B, T, jnp.int32),
            "kv_seqlen": n_B,
        }
    mix_BNTH = cudnn.dot_product_attention(
        q_BTNH.swapaxes(1, 2),
        k_BKSH,
        v_BKSH,
        scale=1 / math.sqrt(H),
        qkv_layout="BNTH",
        **options,
    )
    return mix_BNTH.swapaxes(1, 2)


def fits_cudnn(n_tokens: int, width: int, dtype: jnp.dtype) -> bool:
    """Whether cuDNN supports heads of this width: in bfloat16, on NVIDIA GPUs since Ampere.

    GPUs are recognized by name, since nothing else is known about one that is not in this machine.
    When compiling for such a GPU, JAX allows only the widths that every GPU supports.
    """
    kind = target_device().device_kind
    widest = 256 if HOPPER_OR_LATER.search(kind) and jax.default_backend() == "gpu" else 128
    is_nvidia = kind.startswith(("NVIDIA", "GeForce", "A100"))
    is_ampere_or_later = is_nvidia and BEFORE_AMPERE.search(kind) is None
    width_fits = width % 8 == 0 and width <= widest
    return dtype == jnp.bfloat16 and width_fits and is_ampere_or_later


def by_splash(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """JAX's own TPU kernel, which skips masked tiles."""
    # Imported here because it takes half a second, which no other platform should pay.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N, H = q_BTNH.shape[1:]
    tile = next(n for n in TILES if T % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": tile for name in names})
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q_BNTH = (q_BTNH / math.sqrt(H)).astype(q_BTNH.dtype).swapaxes(1, 2)  # splash does not scale
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH).swapaxes(1, 2)


def fits_splash(n_tokens: int, width: int, dtype: jnp.dtype) -> bool:
    """Whether tiles are whole and products in bfloat16; the kernel compiles for nothing else."""
    whole_tiles = n_tokens % TILES[-1] == 0
    precision = jax.config.jax_default_matmul_precision
    return whole_tiles and dtype == jnp.bfloat16 and precision in (None, "default", "bfloat16")


KERNELS = {
    "cpu": (blockwise_attention.by_blocks, blockwise_attention.fits),
    "gpu": (by_cudnn, fits_cudnn),
    "tpu": (by_splash, fits_splash),
}
