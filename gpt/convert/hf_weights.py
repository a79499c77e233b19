"""Convert the tensors of a Hugging Face folder to our parameters, and back.

One table per family maps our modules to theirs. Tensors are read and written one at a time, so a
conversion needs hardly more memory than the model. The file format:
https://huggingface.co/docs/safetensors
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
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
BUFFERS = re.compile(r".*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")  # in old files


# ---------------------------------------------------------------- which tensor is which parameter


@dataclass(frozen=True)
class Family:
    """How a family names its tensors and lays them out.

    prefix: of all names but the head's; files of a bare body omit it.
    modules: their modules by the path of ours; `{}` stands for the layer.
    out_first: linear layers' matrices are [out, in], while ours are [in, out].
    fused_qkv: queries, keys and values are the thirds of one tensor's last axis.
    """

    prefix: str
    modules: dict[str, str]
    out_first: bool
    fused_qkv: bool


GPT2 = Family(
    prefix="transformer.",
    modules={
        "tokens": "transformer.wte",
        "positions": "transformer.wpe",
        "blocks/attention_norm": "transformer.h.{}.ln_1",
        "blocks/attention/q": "transformer.h.{}.attn.c_attn",
        "blocks/attention/k": "transformer.h.{}.attn.c_attn",
        "blocks/attention/v": "transformer.h.{}.attn.c_attn",
        "blocks/attention/o": "transformer.h.{}.attn.c_proj",
        "blocks/mlp_norm": "transformer.h.{}.ln_2",
        "blocks/mlp/up": "transformer.h.{}.mlp.c_fc",
        "blocks/mlp/down": "transformer.h.{}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    out_first=False,
    fused_qkv=True,
)
LLAMA = Family(
    prefix="model.",
    modules={
        "tokens": "model.embed_tokens",
        "blocks/attention_norm": "model.layers.{}.input_layernorm",
        "blocks/attention/q": "model.layers.{}.self_attn.q_proj",
        "blocks/attention/k": "model.layers.{}.self_attn.k_proj",
        "blocks/attention/v": "model.layers.{}.self_attn.v_proj",
        "blocks/attention/q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks/attention/k_norm": "model.layers.{}.self_attn.k_norm",
        "blocks/attention/o": "model.layers.{}.self_attn.o_proj",
        "blocks/mlp_norm": "model.layers.{}.post_attention_layernorm",
        "blocks/mlp/gate": "model.layers.{}.mlp.gate_proj",
        "blocks/mlp/up": "model.layers.{}.mlp.up_proj",
        "blocks/mlp/down": "model.layers.{}.mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    out_first=True,
    fused_qkv=False,
)


@dataclass(frozen=True)
class Weight:
    """One layer of one of our arrays, and the tensor that holds it.

    path, layer: our stacked array, and the index into it: (layer,), or () outside the blocks.
    shape: with the axes of heads and their width merged, as in all their tensors ([in, out] for a
    matrix), and without the rows that pad the vocabulary.
    third: which third of the tensor's last axis; None if the tensor holds nothing else.
    """

    path: str
    layer: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    is_transposed: bool
    third: int | None


def weights_of(config: ModelConfig, family: Family) -> list[Weight]:
    """All weights of a model of `config`, sorted by tensor name, with q before k before v."""
    weights = []
    for path, leaf in named_leaves(transformer.abstract(config)).items():
        module, _, kind = path.rpartition("/")  # as in blocks/attention/q, kernel
        suffix = "bias" if kind == "bias" else "weight"
        name = f"{family.modules[module or path]}.{suffix}"

        layers: list[tuple[int, ...]] = [()]
        shape = leaf.shape
        if path.startswith("blocks/"):
            layers = [(layer,) for layer in range(shape[0])]
            shape = shape[1:]
        if path in ("tokens", "head"):
            shape = (config.vocab_size, *shape[1:])
        elif kind == "bias":
            shape = (math.prod(shape),)
        elif kind == "kernel":
            n_out = shape[-1] if module.endswith("/o") else math.prod(shape[1:])
            shape = (math.prod(shape) // n_out, n_out)

        is_transposed = family.out_first and kind == "kernel"
        is_fused = family.fused_qkv and module.endswith(("/q", "/k", "/v"))
        third = "qkv".index(module[-1]) if is_fused else None
        for layer in layers:
            weights.append(Weight(path, layer, name.format(*layer), shape, is_transposed, third))
    return sorted(weights, key=lambda weight: (weight.name, weight.third))


def tensor_shapes(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that hold a model of `config`."""
    shapes = {}
    for weight in weights_of(config, family):
        shape = weight.shape[::-1] if weight.is_transposed else weight.shape
        shapes[weight.name] = shape if weight.third is None else (*shape[:-1], 3 * shape[-1])
    return shapes


# ---------------------------------------------------------------- reading


def open_folder(folder: Path) -> dict[str, Any]:
    """A model folder's tensors by name, as the library's lazy slices; `[:]` reads a whole tensor.

    UserError if the folder has neither one file nor shards with an index, or if a file is damaged.
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
    for path in (folder / file for file in files):
        require(path.is_file(), f"{path} cannot be read: it is not a file")
        try:
            # A mapped file's pages would count as our memory as long as it is open.
            opened = safe_open(path, "numpy", backend="pread")
            tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            reason = one_line(error)
            raise UserError(f"{path} is damaged or not a safetensors file: {reason}") from None
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if it holds anything else."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    require(isinstance(values, dict), f"{path} does not hold a JSON object")
    return values


def shorten(names: Sequence[str]) -> str:
    """The first six names, each cut to 100 characters, on one line."""
    more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
    return ", ".join(name[:100] for name in names[:6]) + more


def match_tensors(config: ModelConfig, family: Family, stored: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a model by their full names.

    UserError lists the tensors that are missing, unexpected, of the wrong shape or not floats.
    """
    tensors = {}
    for name, tensor in stored.items():
        if name == HEAD and config.tied:
            continue  # as in transformers, a head stored next to a tied table is ignored
        if name != HEAD:
            name = family.prefix + name.removeprefix(family.prefix)
        if not BUFFERS.fullmatch(name):
            tensors[name] = tensor

    shapes = tensor_shapes(config, family)
    others = []
    for name in sorted(shapes.keys() & tensors.keys()):
        shape, dtype = tensors[name].get_shape(), tensors[name].get_dtype()
        if shape != list(shapes[name]) or dtype not in FLOATS:
            others.append(f"{name} is {dtype} {shape}, expected {list(shapes[name])}")
    problems = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "not expected": sorted(tensors.keys() - shapes.keys()),
        f"of another shape, or of a type other than {', '.join(FLOATS)}": others,
    }
    listed = "; ".join(f"{what}: {shorten(names)}" for what, names in problems.items() if names)
    require(not listed, f"the tensors do not match config.json: {listed}")
    return tensors


def read_params(config: ModelConfig, family: Family, tensors: dict[str, Any]) -> dict[str, Any]:
    """All weights as stacked arrays on the first device; UserError if any is not finite."""
    weights = weights_of(config, family)
    leaves = named_leaves(transformer.abstract(config))
    params: dict[str, jax.Array] = {}
    # For a moment there are two copies of an array and one of its tensors in memory, so the largest
    # come first, while memory is empty.
    for path in sorted(leaves, key=lambda path: -math.prod(leaves[path].shape)):
        array = np.zeros(leaves[path].shape, leaves[path].dtype)
        for weight in weights:
            if weight.path == path:
                tensor = tensors[weight.name][:]
                finite = bool(np.isfinite(tensor).all())
                require(finite, f"{weight.name} holds NaN or infinity: these weights are damaged")
                if weight.third is not None:
                    tensor = np.split(tensor, 3, axis=-1)[weight.third]
                tensor = tensor.T if weight.is_transposed else tensor
                rows = array[weight.layer][: weight.shape[0]]
                rows[:] = tensor.reshape(rows.shape)
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
    for path, leaf in named_leaves(transformer.abstract(config)).items():
        if path not in arrays:
            arrays[path] = np.zeros(leaf.shape)
    for _, weights in itertools.groupby(weights_of(config, family), lambda weight: weight.name):
        parts = []
        for weight in weights:
            rows = np.asarray(arrays[weight.path])[weight.layer][: weight.shape[0]]
            part = rows.astype(dtype).reshape(weight.shape)
            parts.append(part.T if weight.is_transposed else part)
        yield np.concatenate(parts, axis=-1)


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, tensors: Iterable[np.ndarray]
) -> None:
    """Write `tensors` one by one under the names and shapes of `shapes`.

    The library's own writer needs all of them in memory at the same time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * FLOATS[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, shape in zip(tensors, shapes.values(), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"expected a tensor of shape {shape}, got {tensor.shape}")
            flat = np.ascontiguousarray(tensor, FLOATS[dtype]).reshape(-1)
            file.write(flat.view(np.uint8).data)
