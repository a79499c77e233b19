"""Fused attention: a kernel of the platform in place of the plain einsums, where one fits.

The scores of all pairs of tokens, which the plain form writes to memory and reads back, never leave
the chip (Dao et al. 2022, FlashAttention). A kernel is used where `pos_BT` is None (see
positions.Positions), in training and when a prompt is read, without dropout of weights; on
accelerators in bfloat16. That is decided while a program is traced, by the devices that it is for.
A CPU has no such kernel, and long sequences are computed in blocks there (blockwise_attention.py).
Shape letters: see transformer.py.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt.model import attention, blockwise_attention
from gpt.sharding import fitting, mesh_in_force, platform, target_device

try:  # what jax.nn.dot_product_attention calls: it knows our layout, and is not public
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:
    cudnn = None

Kernel = Callable[..., jax.Array]  # of q_BTNH, k_BKSH, v_BKSH
BEFORE_AMPERE = re.compile(r"Tesla|TITAN|Quadro|GTX|MX\d|RTX 20\d0|Xavier|\b[KMPVT]\d")
HOPPER_OR_LATER = re.compile(r"\bG?[HB]\d")  # in data centres
TILES = (512, 256, 128)  # tokens per tile on a TPU: the largest that divides the sequence


def fused_attention(
    q_BTNH, k_BKSH, v_BKSH, pos_BT=None, drop=None, *, deterministic: bool = False
) -> jax.Array:
    """As `plain_attention`, by the platform's kernel where there is one for it.

    `deterministic`: under the flags of --deterministic, see `kernel_for`.
    """
    kernel = kernel_for(q_BTNH, deterministic)
    if kernel is None or pos_BT is not None or drop is not None:
        return attention.plain_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop)
    return on_each_device(kernel, q_BTNH, k_BKSH, v_BKSH)


def prompt_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop) -> jax.Array:
    """As `fused_attention`, for a prompt whose keys and values become the cache: cuDNN reads them
    in the cache's layout, so that they are written once."""
    if cudnn is not None and pos_BT is None and kernel_for(q_BTNH) is by_cudnn:
        return on_each_device(cudnn_on_cache_layout, q_BTNH, k_BKSH, v_BKSH)
    return fused_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop)


def decode_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop) -> jax.Array:
    """As `plain_attention` in a decode step, where a row's T queries are the same token, T times.

    All of them get the result of the first. A single row has too few heads for the kernel to keep
    a GPU busy.
    """
    if cudnn is not None and len(q_BTNH) > 1 and kernel_for(q_BTNH) is by_cudnn:
        # The position of a full row is one past the last slot.
        n_B = jnp.minimum(pos_BT[:, 0] + 1, k_BKSH.shape[2])
        return on_each_device(cudnn_on_cache_layout, q_BTNH, k_BKSH, v_BKSH, n_B)
    mix_B1NH = attention.plain_attention(q_BTNH[:, :1], k_BKSH, v_BKSH, pos_BT[:, :1], drop)
    return jnp.broadcast_to(mix_B1NH, q_BTNH.shape)


def kernel_for(
    q_BTNH: jax.Array | jax.ShapeDtypeStruct, deterministic: bool = False
) -> Kernel | None:
    """The platform's kernel for queries of this shape and type, if it has one.

    A deterministic run on a GPU takes the form of a CPU, in blocks of queries by matrix products.
    XLA compiles cuDNN's gradient with its flag for determinism, but cannot run it: it looks the
    kernel up by another key than the one it was stored with (jax 0.11.2 on an H200;
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
    """`kernel` on each device's rows and heads: the compiler cannot split a kernel by itself.

    `per_row`: further arrays that the kernel takes, with an entry for each row.
    """
    mesh = mesh_in_force()
    if mesh is None:
        return kernel(q_BTNH, k_BKSH, v_BKSH, *per_row)
    q_spec = fitting(mesh, q_BTNH.shape, ("batch", None, "heads", None))
    kv_spec = fitting(mesh, k_BKSH.shape, ("batch", "kv_heads", None, None))
    if kv_spec[1] != q_spec[2]:  # too few key/value heads for the devices: one for each query head
        groups = q_BTNH.shape[2] // k_BKSH.shape[1]
        k_BKSH, v_BKSH = (jnp.repeat(a, groups, axis=1) for a in (k_BKSH, v_BKSH))
        kv_spec = fitting(mesh, k_BKSH.shape, ("batch", "heads", None, None))
    row_specs = [fitting(mesh, array_B.shape, ("batch",)) for array_B in per_row]
    on_device = jax.shard_map(
        kernel,
        in_specs=(q_spec, kv_spec, kv_spec, *row_specs),
        out_specs=q_spec,
        axis_names=set(mesh.auto_axes),
        check_vma=False,  # a kernel does not say over which axes of the mesh its result varies
    )
    return on_device(q_BTNH, k_BKSH, v_BKSH, *per_row)


def by_cudnn(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """cuDNN's kernel, for NVIDIA GPUs."""
    k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn"
    )


def cudnn_on_cache_layout(q_BTNH, k_BKSH, v_BKSH, n_B: jax.Array | None = None) -> jax.Array:
    """As `by_cudnn`, on keys and values in the cache's layout, which jax.nn would transpose.

    With `n_B` all queries of row b see its first `n_B[b]` slots, instead of those up to their own.
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
    """Whether cuDNN takes heads of this width: in bfloat16, on NVIDIA GPUs from Ampere on.

    The name decides, since nothing else is known of a GPU that is not in this machine. For
    programs compiled for such a GPU, JAX allows only the widths that every GPU takes.
    """
    kind = target_device().device_kind
    widest = 256 if HOPPER_OR_LATER.search(kind) and jax.default_backend() == "gpu" else 128
    is_nvidia = kind.startswith(("NVIDIA", "GeForce", "A100"))
    is_ampere_or_later = is_nvidia and BEFORE_AMPERE.search(kind) is None
    width_fits = width % 8 == 0 and width <= widest
    return dtype == jnp.bfloat16 and width_fits and is_ampere_or_later


def by_splash(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """JAX's own kernel for TPUs, which skips masked tiles."""
    # Imported where it is used: half a second that no other platform should pay.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N, H = q_BTNH.shape[1:]
    tile = next(n for n in TILES if T % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": tile for name in names})
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q_BNTH = (q_BTNH / math.sqrt(H)).astype(q_BTNH.dtype).swapaxes(1, 2)  # it does not scale
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH).swapaxes(1, 2)


def fits_splash(n_tokens: int, width: int, dtype: jnp.dtype) -> bool:
    """Whole tiles, and products in bfloat16: it compiles for nothing else."""
    whole_tiles = n_tokens % TILES[-1] == 0
    precision = jax.config.jax_default_matmul_precision
    return whole_tiles and dtype == jnp.bfloat16 and precision in (None, "default", "bfloat16")


KERNELS = {
    "cpu": (blockwise_attention.by_blocks, blockwise_attention.fits),
    "gpu": (by_cudnn, fits_cudnn),
    "tpu": (by_splash, fits_splash),
}
