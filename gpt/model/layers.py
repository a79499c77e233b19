"""The parts of a block besides attention: linear layers, norms, the MLP, dropout.

Every weight is an `nnx.Param` that carries its logical axes as Flax's `out_sharding` metadata, read
by `nnx.get_partition_spec`. `eager_sharding=False` keeps Flax from acting on it, because
`sharding.state_shardings` places the whole state at once.
Shape letters are defined in transformer.py; here also M rows of activations, and I inputs and O
outputs of a matrix.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from flax import nnx

from gpt.config import ModelConfig
from gpt.model.int8 import Int8
from gpt.sharding import constrain, platform

Initializer = Callable[[jax.Array, tuple, str], jax.Array]  # key, shape, dtype


def weight(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter with these logical axis names (None: never split)."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def normal(std: float) -> Initializer:
    """An initializer that samples from N(0, std²)."""

    def draw(key: jax.Array, shape: tuple, dtype: str) -> jax.Array:
        return (jax.random.normal(key, shape) * std).astype(dtype)

    return draw


def exact_products(compute_dtype: str | None) -> AbstractContextManager:
    """A context in which float32 products are really computed in float32.

    By default, GPUs would multiply float32 in TF32 and TPUs in bfloat16. The user's own
    JAX_DEFAULT_MATMUL_PRECISION takes precedence; a CPU computes the same either way.
    """
    chosen_by_user = jax.config.jax_default_matmul_precision is not None
    if compute_dtype == "bfloat16" or chosen_by_user:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


DROPOUT_SITES = {"attention_weights": 0, "attention": 1, "mlp": 2, "embedding": 3}


def dropout(x: jax.Array, dropout_key_B: jax.Array | None, rate: float, *, site: str) -> jax.Array:
    """Inverted dropout with a key per row, so batch splits and meshes do not change a row's mask.

    `site` names a place in the model; each has its own random bits. Without keys, nothing is
    dropped.
    """
    if dropout_key_B is None or rate == 0:
        return x

    def draw_kept(key: jax.Array) -> jax.Array:
        site_key = jax.random.fold_in(key, DROPOUT_SITES[site])
        return jax.random.bernoulli(site_key, 1 - rate, x.shape[1:])

    kept = jax.vmap(draw_kept)(dropout_key_B)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Linear(nnx.Module):
    """y = x W + b over the last axes of x: [..., *inputs] to [..., *outputs].

    `kernel` is [*inputs, *outputs]; it may also be an `Int8` matrix. `bias` is [*outputs] or None.
    """

    def __init__(
        self,
        key: jax.Array,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        use_bias: bool,
        dtype: str,
        kernel_init: Initializer,
    ):
        self.inputs, self.outputs = inputs, outputs
        self.kernel = weight(kernel_init(key, (*inputs, *outputs), dtype), axes)
        bias_axes = tuple(None if name == "embed" else name for name in axes[len(inputs) :])
        self.bias = weight(jnp.zeros(outputs, dtype), bias_axes) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # Contract one axis of each operand. With more axes the backward pass is many times slower
        # on a CPU, and contracting two kernel axes would transpose the kernel on every call.
        leading = x.shape[: x.ndim - len(self.inputs)]
        x_MI = x.reshape(-1, math.prod(self.inputs))
        kernel = self.kernel[...]
        if isinstance(kernel, Int8):
            y_MO = kernel.product(x_MI).astype(x.dtype)
        else:
            # A stacked kernel's metadata also names the layer axis, which this kernel lacks.
            axes = self.kernel.out_sharding[-kernel.ndim :]
            kernel = gather_for_matmul(axes, kernel.astype(x.dtype))
            kernel_IO = kernel.reshape(x_MI.shape[1], -1)
            if kernel_IO.shape[0] > kernel_IO.shape[1]:
                y_MO = narrowing_matmul(jax.config.jax_default_matmul_precision, x_MI, kernel_IO)
            else:
                y_MO = x_MI @ kernel_IO
        y = y_MO.reshape(*leading, *self.outputs)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def narrowing_matmul(precision: str | None, x_MI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x W for a kernel with more inputs than outputs.

    On a CPU, such a kernel's gradient takes nearly twice as long to compute as its transpose, so
    there the transpose is computed and transposed back.
    """
    return jnp.matmul(x_MI, kernel_IO, precision=precision)


def _narrowing_backward(precision, factors, gradient_MO):
    x_MI, kernel_IO = factors
    product = functools.partial(jnp.matmul, precision=precision)

    def turned_product(x_MI: jax.Array, gradient_MO: jax.Array) -> jax.Array:
        # Without the barrier, the compiler would undo the transposition.
        return jax.lax.optimization_barrier(product(gradient_MO.T, x_MI)).T

    def plain_product(x_MI: jax.Array, gradient_MO: jax.Array) -> jax.Array:
        return product(x_MI.T, gradient_MO)

    gradient_IO = jax.lax.platform_dependent(
        x_MI, gradient_MO, cpu=turned_product, default=plain_product
    )
    return product(gradient_MO, kernel_IO.T), gradient_IO


narrowing_matmul.defvjp(
    lambda precision, *factors: (narrowing_matmul(precision, *factors), factors),
    _narrowing_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather_for_matmul(axes: tuple[str | None, ...], matrix: jax.Array) -> jax.Array:
    """A matrix with these logical axes, gathered over fsdp; its gradient is sharded like the input.

    Left to itself, the compiler may gather it again for the backward pass, or move the activations
    instead.
    """
    return constrain(matrix, *(None if name == "embed" else name for name in axes))


gather_for_matmul.defvjp(
    lambda axes, matrix: (gather_for_matmul(axes, matrix), None),
    lambda axes, _, gradient: (constrain(gradient, *axes),),
)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """`x` squashed smoothly into (-cap, cap) (Gemma Team 2024, section 2); unchanged for cap 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def table_product(x_MI: jax.Array, table_OI: jax.Array | Int8) -> jax.Array:
    """x table^T in float32, for a table stored as [outputs, inputs]: the model's head."""
    if isinstance(table_OI, Int8):
        return table_OI.product(x_MI)
    table_OI = table_OI.astype(x_MI.dtype)
    if x_MI.dtype != jnp.float32:
        return widening_product(x_MI, table_OI)
    return jnp.einsum("MI,OI->MO", x_MI, table_OI)


@jax.custom_vjp
def widening_product(x_MI: jax.Array, table_OI: jax.Array) -> jax.Array:
    """x table^T in float32 of two bfloat16 arrays, with gradients that are bfloat16 products too.

    JAX's own gradient multiplies the float32 cotangent without rounding it, which is several times
    slower on an accelerator.
    """
    return jnp.einsum("MI,OI->MO", x_MI, table_OI, preferred_element_type=jnp.float32)


def _widening_backward(factors, gradient_MO):
    # Sum in float32; return each gradient in its factor's dtype.
    x_MI, table_OI = factors
    gradient_MO = gradient_MO.astype(x_MI.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    gradient_MI = product("MO,OI->MI", gradient_MO, table_OI).astype(x_MI.dtype)
    gradient_OI = product("MO,MI->OI", gradient_MO, x_MI).astype(table_OI.dtype)
    return gradient_MI, gradient_OI


widening_product.defvjp(lambda *factors: (widening_product(*factors), factors), _widening_backward)


def unit_mean_square(x: jax.Array, epsilon: float) -> jax.Array:
    """`x` divided by its root mean square along the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the last axis, then scale and shift (Ba et al. 2016)."""

    def __init__(self, config: ModelConfig, width: int):
        self.epsilon = config.norm_epsilon
        self.scale = weight(jnp.ones(width, config.param_dtype), (None,))
        bias = weight(jnp.zeros(width, config.param_dtype), (None,))
        self.bias = bias if config.biased("norm") else None

    def standardize(self, x: jax.Array) -> jax.Array:
        if platform() == "gpu":
            # This compiles to one kernel, jax.nn's form to two.
            return unit_mean_square(x - jnp.mean(x, axis=-1, keepdims=True), self.epsilon)
        return jax.nn.standardize(x, axis=-1, epsilon=self.epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Computed in float32, returned in the dtype of `x`."""
        y = self.standardize(x.astype(jnp.float32)) * self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(LayerNorm):
    """Unit mean square without centering (Zhang & Sennrich 2019)."""

    def standardize(self, x: jax.Array) -> jax.Array:
        return unit_mean_square(x, self.epsilon)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # GPT-2's
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021
    "swiglu": jax.nn.silu,
}


class MLP(nnx.Module):
    """Two linear layers around an activation; a gated MLP has a third (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.activation = config.mlp
        D, F = config.d_model, config.ff_width
        up_key, down_key = jax.random.split(key)
        options = {"use_bias": config.biased("mlp"), "dtype": config.param_dtype}
        into = {"kernel_init": normal(config.init_std)} | options
        self.up = Linear(up_key, (D,), (F,), ("embed", "mlp"), **into)
        gate_key = jax.random.fold_in(key, 2)
        gate = Linear(gate_key, (D,), (F,), ("embed", "mlp"), **into) if config.gated_mlp else None
        self.gate = gate

        def draw_down(key: jax.Array, shape: tuple, dtype: str) -> jax.Array:
            # Drawn as [D, F] and transposed, to keep existing seeds reproducible.
            return normal(config.residual_std)(key, shape[::-1], dtype).T

        self.down = Linear(down_key, (F,), (D,), ("mlp", "embed"), kernel_init=draw_down, **options)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            h_BTF = activate(self.up(x_BTD))
        else:
            h_BTF = activate(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(h_BTF)
