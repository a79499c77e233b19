"""The tensors of a Hugging Face folder as our parameters, and back.

One table per family says which of their modules is which of ours. Tensors are read and written one
at a time, so that a conversion needs hardly more memory than the model. The format of the files:
https://huggingface.co/docs/safetensors
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open

from gpt import checkpoint
from gpt.config import ModelConfig
from gpt.digest import named_leaves
from gpt.errors import UserError, one_line, require
from gpt.model import transformer

FLOATS = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
BUFFERS = re.compile(r".*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")  # of old files


# ---------------------------------------------------------------- which tensor is which parameter


@dataclass(frozen=True)
class Family:
    """How a family names its tensors, and how they lie in memory.

    prefix: what all names but the head's begin with (files of a bare body leave it out).
    modules: their modules by the path of ours; `{}` stands for the layer.
    out_first: a linear layer's matrix is [out, in], where ours is [in, out].
    fused_qkv: queries, keys and values are the thirds of one tensor's last axis.
    """

    prefix: str
    modules: dict[str, str]
    out_first: bool
    fused_qkv: bool


GPT2 = Family(
    prefix="transformer.",
    modules={
        "tokens": "wte",
        "positions": "wpe",
        "blocks/attention_norm": "h.{}.ln_1",
        "blocks/attention/q": "h.{}.attn.c_attn",
        "blocks/attention/k": "h.{}.attn.c_attn",
        "blocks/attention/v": "h.{}.attn.c_attn",
        "blocks/attention/o": "h.{}.attn.c_proj",
        "blocks/mlp_norm": "h.{}.ln_2",
        "blocks/mlp/up": "h.{}.mlp.c_fc",
        "blocks/mlp/down": "h.{}.mlp.c_proj",
        "final_norm": "ln_f",
    },
    out_first=False,
    fused_qkv=True,
)
LLAMA = Family(
    prefix="model.",
    modules={
        "tokens": "embed_tokens",
        "blocks/attention_norm": "layers.{}.input_layernorm",
        "blocks/attention/q": "layers.{}.self_attn.q_proj",
        "blocks/attention/k": "layers.{}.self_attn.k_proj",
        "blocks/attention/v": "layers.{}.self_attn.v_proj",
        "blocks/attention/q_norm": "layers.{}.self_attn.q_norm",
        "blocks/attention/k_norm": "layers.{}.self_attn.k_norm",
        "blocks/attention/o": "layers.{}.self_attn.o_proj",
        "blocks/mlp_norm": "layers.{}.post_attention_layernorm",
        "blocks/mlp/gate": "layers.{}.mlp.gate_proj",
        "blocks/mlp/up": "layers.{}.mlp.up_proj",
        "blocks/mlp/down": "layers.{}.mlp.down_proj",
        "final_norm": "norm",
    },
    out_first=True,
    fused_qkv=False,
)


@dataclass(frozen=True)
class Weight:
    """One of our arrays in one layer, and the tensor that holds it.

    path, layer: our stacked array, and the index in it (None for an array outside the blocks).
    shape: ours, without the layers and the rows that pad the vocabulary. flat_shape: with the axes
    of heads and their width merged, as in all their tensors: [in, out] for a matrix.
    third: which third of the tensor's last axis; None where the tensor holds nothing else.
    """

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    flat_shape: tuple[int, ...]
    is_transposed: bool
    third: int | None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.flat_shape[::-1] if self.is_transposed else self.flat_shape
        return shape if self.third is None else (*shape[:-1], 3 * shape[-1])

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """Our array in one layer; a view of their tensor."""
        if self.third is not None:
            tensor = np.split(tensor, 3, axis=-1)[self.third]
        return (tensor.T if self.is_transposed else tensor).reshape(self.shape)

    def to_tensor(self, array: np.ndarray) -> np.ndarray:
        """Their tensor, or a third of one; a view of our array in one layer."""
        flat = array.reshape(self.flat_shape)
        return flat.T if self.is_transposed else flat


def weights_of(config: ModelConfig, family: Family) -> list[Weight]:
    """All weights of a model of `config`, queries before keys before values."""
    weights = []
    for path, leaf in named_leaves(transformer.abstract(config)).items():
        module, _, kind = path.rpartition("/")  # as in blocks/attention/q, kernel
        name = HEAD
        if path != "head":
            suffix = "bias" if kind == "bias" else "weight"
            name = f"{family.prefix}{family.modules[module or path]}.{suffix}"

        layers: list[int | None] = [None]
        shape = leaf.shape
        if path.startswith("blocks/"):
            layers = list(range(leaf.shape[0]))
            shape = leaf.shape[1:]
        elif path in ("tokens", "head"):
            shape = (config.vocab_size, *leaf.shape[1:])
        flat_shape = shape
        if kind == "bias":
            flat_shape = (math.prod(shape),)
        elif kind == "kernel":
            n_out = shape[-1] if module.endswith("/o") else math.prod(shape[1:])
            flat_shape = (math.prod(shape) // n_out, n_out)

        is_transposed = family.out_first and kind == "kernel"
        is_fused = family.fused_qkv and module.endswith(("/q", "/k", "/v"))
        third = "qkv".index(module[-1]) if is_fused else None
        for layer in layers:
            at = (path, layer, name.format(layer))
            weights.append(Weight(*at, shape, flat_shape, is_transposed, third))
    return sorted(weights, key=lambda weight: weight.third or 0)


def tensor_shapes(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that hold a model of `config`."""
    return {weight.name: weight.tensor_shape for weight in weights_of(config, family)}


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file that has not been read."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        # The file is opened for each tensor: its pages count as ours for as long as it is open.
        with open_safetensors(self.path) as file:
            return file.get_tensor(self.name)


def open_safetensors(path: Path) -> safe_open:
    """An open safetensors file, whose header the library has checked."""
    require(path.is_file(), f"{path} cannot be read: it is not a file")
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"{path} is damaged or not a safetensors file: {reason}") from None


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's folder by name, from one file or from shards with an index.

    UserError if the folder has neither, or a file is damaged. No tensor is read.
    """
    require(folder.exists(), f"{folder} does not exist: expected a model's folder")
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        file_of = read_json(folder / INDEX).get("weight_map")
        require(isinstance(file_of, dict) and file_of, f"{folder / INDEX} has no weight_map")
        files = sorted({str(file) for file in file_of.values()})
    else:
        raise UserError(
            f"{folder} holds no {WEIGHTS}: expected a folder with config.json and {WEIGHTS} or its "
            f"shards with their index{checkpoint.advice_on_pickles(folder)}"
        )

    tensors = {}
    for file in files:
        with open_safetensors(folder / file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                tensors[name] = StoredTensor(folder / file, name, str(part.get_dtype()), shape)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if it cannot be read or is anything else."""
    require(path.is_file(), f"{path} cannot be read: it is not a file")
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    require(isinstance(values, dict), f"{path} does not hold a JSON object")
    return values


def shorten(names: Iterable[str]) -> str:
    """The first six of many names from files of others, on one line."""
    names = [name if name.isprintable() else repr(name) for name in names]
    more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
    return ", ".join(name[:100] for name in names[:6]) + more


def match_tensors(
    config: ModelConfig, family: Family, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors of a model by their whole names.

    UserError lists the tensors that are missing, unexpected, of another shape or not floats.
    """
    tensors = {}
    for name, tensor in stored.items():
        if name != HEAD:
            name = family.prefix + name.removeprefix(family.prefix)
        # As in transformers, a head beside a tied table is not used.
        is_unused = BUFFERS.fullmatch(name) or (config.tied and name == HEAD)
        if not is_unused:
            tensors[name] = tensor

    expected = tensor_shapes(config, family)
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "not expected": sorted(tensors.keys() - expected.keys()),
        f"of another shape, or of a type other than {', '.join(FLOATS)}": [
            f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {list(expected[name])}"
            for name, tensor in sorted(tensors.items())
            if name in expected and (tensor.shape != expected[name] or tensor.dtype not in FLOATS)
        ],
    }
    listed = "; ".join(f"{what}: {shorten(names)}" for what, names in problems.items() if names)
    require(not listed, f"the tensors are not those that config.json describes: {listed}")
    return tensors


def read_params(
    config: ModelConfig, family: Family, tensors: dict[str, StoredTensor]
) -> dict[str, Any]:
    """All weights as stacked arrays on the first device; UserError if one is not finite."""
    weights = weights_of(config, family)
    leaves = named_leaves(transformer.abstract(config))
    params: dict[str, jax.Array] = {}
    # For a moment there are two copies of an array, and one of its tensors. The largest come first,
    # while memory is empty.
    for path in sorted(leaves, key=lambda path: -math.prod(leaves[path].shape)):
        array = np.zeros(leaves[path].shape, leaves[path].dtype)
        for weight in weights:
            if weight.path == path:
                tensor = tensors[weight.name].read()
                finite = bool(np.isfinite(tensor).all())
                require(finite, f"{weight.name} holds NaN or infinity: these weights are damaged")
                in_layer = array if weight.layer is None else array[weight.layer]
                in_layer[: weight.shape[0]] = weight.from_tensor(tensor)
        params[path] = jax.block_until_ready(jax.device_put(array))
    return unflatten_dict(params, sep="/")


# ---------------------------------------------------------------- writing


def to_tensors(
    config: ModelConfig, family: Family, params: Any, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Their tensors in the order of `tensor_shapes(config, family)`, from our stacked `params`.

    A bias that `config` has and `params` lacks becomes zeros.
    """
    arrays = named_leaves(params)
    weights_in: dict[str, list[Weight]] = {}
    for weight in weights_of(config, family):
        weights_in.setdefault(weight.name, []).append(weight)

    for weights in weights_in.values():
        parts = []
        for weight in weights:
            if weight.path in arrays:
                array = np.asarray(arrays[weight.path])
                array = array if weight.layer is None else array[weight.layer]
                array = array[: weight.shape[0]].astype(dtype)
            else:
                array = np.zeros(weight.shape, dtype)
            parts.append(weight.to_tensor(array))
        yield parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, tensors: Iterable[np.ndarray]
) -> None:
    """Write `tensors` under the names and shapes of `shapes`, each as it comes.

    The library's own writer wants all of them in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * FLOATS[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, shape in zip(tensors, shapes.values(), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"a tensor of {tensor.shape} where {shape} was announced")
            flat = np.ascontiguousarray(tensor, FLOATS[dtype]).reshape(-1)
            file.write(flat.view(np.uint8).data)
