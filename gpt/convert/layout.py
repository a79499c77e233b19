"""Which of their tensors is which of our weights, both ways, and how one is the other turned.

One table a family: the path of our leaf -> their name and the order of its axes. Ours are declared
in model/, with the letters of transformer.py: q [D, N, H], o [N, H, D], up and down [D, F].
Knows neither files nor configs of theirs.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from gpt.checkpoint import named_leaves
from gpt.config import ModelConfig
from gpt.model import transformer


@dataclass(frozen=True)
class Part:
    """One of their tensors as one of our leaves; `{}` in its name stands for the layer.

    `order`: our axes in the order that theirs has them (none: the same). The first `rows` of these
    are one axis of theirs, the others its second. `third`: which third of the columns it is, of
    three leaves in one tensor.
    """

    name: str
    order: tuple[int, ...] | None = None
    rows: int = 1
    third: int | None = None

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor, from that of our leaf in one layer."""
        if self.third is not None:
            return (*ours[:-2], 3 * ours[-2] * ours[-1])
        turned = [ours[i] for i in self.order or range(len(ours))]
        sides = (math.prod(turned[: self.rows]), math.prod(turned[self.rows :]))
        return sides[:1] if self.rows >= len(ours) else sides

    def take(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """A view of their tensor that has the shape of our leaf in one layer."""
        if self.third is not None:
            return theirs.reshape(*ours[:-2], 3, *ours[-2:])[..., self.third, :, :]
        order = self.order or tuple(range(len(ours)))
        return theirs.reshape([ours[i] for i in order]).transpose(np.argsort(order))

    def give(self, *leaves: np.ndarray) -> np.ndarray:
        """Their tensor from our leaf in one layer, or from the three that it is made of."""
        ours = leaves[0].shape
        if self.third is not None:
            return np.stack(leaves, axis=-3).reshape(self.shape(ours))
        order = self.order or tuple(range(len(ours)))
        return leaves[0].transpose(order).reshape(self.shape(ours))


@dataclass(frozen=True)
class Family:
    """A naming of tensors: what stands before all but the head, the parts, and what is no weight"""

    prefix: str
    parts: dict[str, Part]
    buffers: re.Pattern

    def whole_name(self, name: str) -> str:
        """A tensor's name in a file, from that without the prefix; the head's has none."""
        return name if name == HEAD else self.prefix + name


def norm(path: str, name: str) -> dict[str, Part]:
    """A norm's scale and bias."""
    return {f"{path}/scale": Part(f"{name}.weight"), f"{path}/bias": Part(f"{name}.bias")}


def fused(name: str) -> dict[str, Part]:
    """GPT-2's one projection to queries, keys and values."""
    parts = {}
    for third, letter in enumerate("qkv"):
        parts[f"blocks/attention/{letter}"] = Part(f"{name}.weight", third=third)
        parts[f"blocks/attention/{letter}_bias"] = Part(f"{name}.bias", third=third)
    return parts


def linear(path: str, name: str, **turning) -> dict[str, Part]:
    """A projection and its bias."""
    bias_rows = 2 if path[-1] in "qkv" else 1
    return {
        path: Part(f"{name}.weight", **turning),
        f"{path}_bias": Part(f"{name}.bias", rows=bias_rows),
    }


HEAD = "lm_head.weight"
OUT_FIRST = {"order": (1, 0)}
GPT2 = Family(  # its matrices are [in, out]
    "transformer.",
    {"head": Part(HEAD), "tokens": Part("wte.weight"), "positions": Part("wpe.weight")}
    | norm("blocks/attention_norm", "h.{}.ln_1")
    | fused("h.{}.attn.c_attn")
    | linear("blocks/attention/o", "h.{}.attn.c_proj", rows=2)
    | norm("blocks/mlp_norm", "h.{}.ln_2")
    | linear("blocks/mlp/up", "h.{}.mlp.c_fc")
    | linear("blocks/mlp/down", "h.{}.mlp.c_proj", **OUT_FIRST)
    | norm("final_norm", "ln_f"),
    re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
)
LLAMA = Family(  # its matrices are [out, in]
    "model.",
    {"head": Part(HEAD), "tokens": Part("embed_tokens.weight")}
    | norm("blocks/attention_norm", "layers.{}.input_layernorm")
    | linear("blocks/attention/q", "layers.{}.self_attn.q_proj", order=(1, 2, 0), rows=2)
    | linear("blocks/attention/k", "layers.{}.self_attn.k_proj", order=(1, 2, 0), rows=2)
    | linear("blocks/attention/v", "layers.{}.self_attn.v_proj", order=(1, 2, 0), rows=2)
    | norm("blocks/attention/q_norm", "layers.{}.self_attn.q_norm")
    | norm("blocks/attention/k_norm", "layers.{}.self_attn.k_norm")
    | linear("blocks/attention/o", "layers.{}.self_attn.o_proj", order=(2, 0, 1))
    | norm("blocks/mlp_norm", "layers.{}.post_attention_layernorm")
    | linear("blocks/mlp/gate", "layers.{}.mlp.gate_proj", **OUT_FIRST)
    | linear("blocks/mlp/up", "layers.{}.mlp.up_proj", **OUT_FIRST)
    | linear("blocks/mlp/down", "layers.{}.mlp.down_proj")
    | norm("final_norm", "norm"),
    re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our leaves by path: stacked ones with their layers, tables with their padding."""
    return {path: leaf.shape for path, leaf in named_leaves(transformer.abstract(config)).items()}


def one_layer(config: ModelConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what one of their tensors holds of a leaf: one layer, no padding."""
    if path.startswith("blocks/"):
        return shape[1:]
    return (config.vocab_size, *shape[1:]) if path in ("tokens", "head") else shape


def layers_of(config: ModelConfig, path: str) -> range:
    """The layers for which a leaf holds a tensor of its own."""
    return range(config.n_layers if path.startswith("blocks/") else 1)


def tensor_shapes(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """Names, without the prefix, and shapes of the tensors that hold a model of `config`."""
    expected = {}
    for path, shape in leaf_shapes(config).items():
        part = family.parts[path]
        theirs = part.shape(one_layer(config, path, shape))
        expected |= {part.name.format(i): theirs for i in layers_of(config, path)}
    return expected
