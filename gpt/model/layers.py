"""Norms, activations and the MLP, and how weights are declared in Flax NNX.

Each weight bears the logical axes it is sharded by, under a name of ours that Flax ignores.
Shape letters: see transformer.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from gpt.config import ModelConfig
from gpt.model.int8 import Int8
from gpt.sharding import constrain


def drop(key_B: jax.Array | None, rate: float, place: int, x: jax.Array) -> jax.Array:
    """Inverted dropout with a key per row, so that no batch split or mesh changes a row's mask."""
    if key_B is None or rate == 0:
        return x

    def row(key, x_row):
        kept = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x_row.shape)
        return jnp.where(kept, x_row / (1 - rate), 0).astype(x.dtype)

    return jax.vmap(row)(key_B, x)


def normal(key: jax.Array, shape: tuple, axes: tuple, std: float, dtype) -> nnx.Param:
    """A weight drawn from N(0, std²), with the logical axes it is sharded by."""
    return nnx.Param((jax.random.normal(key, shape) * std).astype(dtype), axes=axes)


def constant(value: float, shape: tuple, axes: tuple, dtype) -> nnx.Param:
    """A weight that starts at `value` everywhere."""
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


def biases(c: ModelConfig, part: str):
    """What makes the biases of a part of the model: zeros, or None where it has none."""
    if not c.biased(part):
        return lambda shape, axes: None
    return functools.partial(constant, 0, dtype=c.param_dtype)


def plus(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`y`, shifted if there is a bias."""
    return y if bias is None else y + bias[...].astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(axes: tuple, matrix: jax.Array) -> jax.Array:
    """A matrix of these logical axes, whole over fsdp; its gradient is split as the matrix was.

    Left to itself the compiler may gather it once more for the backward pass, or move what it
    multiplies instead.
    """
    return constrain(matrix, *(None if name == "embed" else name for name in axes))


gather.defvjp(
    lambda axes, matrix: (gather(axes, matrix), None),
    lambda axes, _, gradient: (constrain(gradient, *axes),),
)


def ready(weight: nnx.Param, dtype) -> jax.Array | Int8:
    """A matrix as a product takes it: int8 as it is, another in `dtype` and whole over fsdp."""
    matrix = weight[...]
    if isinstance(matrix, Int8):
        return matrix
    return gather(weight.get_metadata()["axes"], matrix.astype(dtype))


def product(x_MI: jax.Array, weight: nnx.Param) -> jax.Array:
    """x W for tokens as rows; W's first axes, as many entries as x is wide, are contracted.

    On rows and over one axis: the backward pass of a three-axis product is many times slower on
    CPU, and contracting two axes would transpose the weight at each call.
    """
    matrix = ready(weight, x_MI.dtype)
    if isinstance(matrix, Int8):
        return matrix.product(x_MI).astype(x_MI.dtype)
    return x_MI @ matrix.reshape(x_MI.shape[1], -1)


def linear(x_MD: jax.Array, weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
    """x W + b for tokens as rows; W [D, ...] gives [M, ...]."""
    matrix = weight[...]
    outputs = matrix.scale.shape if isinstance(matrix, Int8) else matrix.shape[1:]
    return plus(product(x_MD, weight).reshape(len(x_MD), *outputs), bias)


def transposed_product(x_MI: jax.Array, matrix_OI: jax.Array | Int8, dtype) -> jax.Array:
    """x W in `dtype` for a matrix kept as [out, in]: its backward pass is faster on CPU."""
    if isinstance(matrix_OI, Int8):
        return matrix_OI.product(x_MI).astype(dtype)
    matrix_OI = matrix_OI.astype(x_MI.dtype)
    if x_MI.dtype != dtype:
        return widening_product(x_MI, matrix_OI)
    return jnp.einsum("MI,OI->MO", x_MI, matrix_OI)


@jax.custom_vjp
def widening_product(x_MI: jax.Array, matrix_OI: jax.Array) -> jax.Array:
    """x W in float32 of two arrays in bfloat16, and so are those of its backward pass.

    JAX's own multiplies the float32 gradient as it is, for which an accelerator takes several times
    as long.
    """
    return jnp.einsum("MI,OI->MO", x_MI, matrix_OI, preferred_element_type=jnp.float32)


def widening_product_and_factors(x_MI, matrix_OI):
    """The product, and what its gradients need."""
    return widening_product(x_MI, matrix_OI), (x_MI, matrix_OI)


def widening_product_gradients(factors, gradient_MO):
    """Those of both factors: summed in float32, in the type of the factors."""
    x_MI, matrix_OI = factors
    gradient_MO = gradient_MO.astype(x_MI.dtype)
    sum_up = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    gradient_MI = sum_up("MO,OI->MI", gradient_MO, matrix_OI).astype(x_MI.dtype)
    return gradient_MI, sum_up("MO,MI->OI", gradient_MO, x_MI).astype(matrix_OI.dtype)


widening_product.defvjp(widening_product_and_factors, widening_product_gradients)


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the last axis, then scale and shift (Ba et al. 2016)."""

    def __init__(self, c: ModelConfig, width: int):
        self.epsilon = c.norm_epsilon
        self.scale = constant(1, (width,), (None,), c.param_dtype)
        self.bias = constant(0, (width,), (None,), c.param_dtype) if c.biased("norm") else None

    def centre(self, x: jax.Array) -> jax.Array:
        """x of zero mean and unit variance."""
        return jax.nn.standardize(x, axis=-1, epsilon=self.epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        """In float32, returned in the type of `x`."""
        y = self.centre(x.astype(jnp.float32)) * self.scale[...].astype(jnp.float32)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class RMSNorm(LayerNorm):
    """Unit mean square, the mean left as it is (Zhang & Sennrich 2019)."""

    def centre(self, x: jax.Array) -> jax.Array:
        """x of unit mean square."""
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # GPT-2's
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021
    "swiglu": jax.nn.silu,
}


class MLP(nnx.Module):
    """Two linear layers around an activation.

    The second is kept as [out, in] where it is `stacked`: its backward pass is faster on CPU. Where
    it is not, as [in, out]: a few rows are faster.
    """

    def __init__(self, c: ModelConfig, key: jax.Array, stacked: bool):
        D, F = c.d_model, c.ff_width
        self.activation, self.stacked = c.mlp, stacked
        keys = jax.random.split(key)
        self.up = normal(keys[0], (D, F), ("embed", "mlp"), c.init_std, c.param_dtype)
        std, order = c.init_std / math.sqrt(2 * c.n_layers), 1 if stacked else -1
        shape, axes = (D, F)[::order], ("embed", "mlp")[::order]
        self.down = normal(keys[1], shape, axes, std, c.param_dtype)
        bias = biases(c, "mlp")
        self.up_bias, self.down_bias = bias((F,), ("mlp",)), bias((D,), (None,))

    def widen(self, x_MD: jax.Array) -> jax.Array:
        """The inner layer, h_MF."""
        return ACTIVATIONS[self.activation](linear(x_MD, self.up, self.up_bias))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        h_MF = self.widen(x_BTD.reshape(B * T, D))
        if self.stacked:
            y_MD = transposed_product(h_MF, ready(self.down, h_MF.dtype), h_MF.dtype)
        else:
            y_MD = product(h_MF, self.down)
        return plus(y_MD, self.down_bias).reshape(B, T, D)


class GatedMLP(MLP):
    """The inner layer multiplied by an activated third matrix (Shazeer 2020)."""

    def __init__(self, c: ModelConfig, key: jax.Array, stacked: bool):
        super().__init__(c, key, stacked)
        shape, axes = (c.d_model, c.ff_width), ("embed", "mlp")
        self.gate = normal(jax.random.fold_in(key, 2), shape, axes, c.init_std, c.param_dtype)
        self.gate_bias = biases(c, "mlp")(shape[1:], axes[1:])

    def widen(self, x_MD: jax.Array) -> jax.Array:
        """The inner layer times its gate, h_MF."""
        gate_MF = ACTIVATIONS[self.activation](linear(x_MD, self.gate, self.gate_bias))
        return gate_MF * linear(x_MD, self.up, self.up_bias)


def make_mlp(c: ModelConfig, key: jax.Array, stacked: bool) -> MLP:
    """The MLP of a block: gated where its activation is a gate's."""
    return (GatedMLP if c.mlp == "swiglu" else MLP)(c, key, stacked)
