"""The tensors of a Hugging Face folder as our parameters, and back.

One table per family says which of their tensors is which of our leaves, and how its axes are
ordered. Tensors are read and written one at a time, so that a conversion needs hardly more memory
than the model. The format of the files: https://huggingface.co/docs/safetensors
"""

import hashlib
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
from safetensors import SafetensorError, safe_open

from gpt import flops
from gpt.checkpoint import named_leaves
from gpt.config import Dtype, ModelConfig
from gpt.errors import UserError, require
from gpt.model import transformer

FLOATS = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
PARAM_DTYPES: dict[Dtype, np.dtype] = {"float32": FLOATS["F32"], "bfloat16": FLOATS["BF16"]}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEAD = "lm_head.weight"


# ---------------------------------------------------------------- which tensor is which parameter


@dataclass(frozen=True)
class Part:
    """Where one of our leaves lies among their tensors.

    name: the tensor's name without the family's prefix; `{}` stands for the layer.
    axes: "our axes -> their axes" in the letters of transformer.py, for one layer. Parentheses
        merge axes into one, as in "D N H -> (N H) D".
    third: the leaf is the first, second or third part (0, 1, 2) of the tensor's last axis.
    """

    name: str
    axes: str
    third: int | None = None

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor, from the shape of our leaf in one layer."""
        letters, groups = self._parse()
        size = dict(zip(letters, ours, strict=True))
        theirs = [math.prod(size[letter] for letter in group) for group in groups]
        if self.third is not None:
            theirs[-1] *= 3
        return tuple(theirs)

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """Their tensor as our leaf of shape `ours` in one layer; a view."""
        letters, groups = self._parse()
        if self.third is not None:
            theirs = np.split(theirs, 3, axis=-1)[self.third]
        size = dict(zip(letters, ours, strict=True))
        order = "".join(groups)
        split = theirs.reshape([size[letter] for letter in order])
        return split.transpose([order.index(letter) for letter in letters])

    def to_theirs(self, leaf: np.ndarray) -> np.ndarray:
        """Our leaf in one layer as their tensor, or as its third of one."""
        letters, groups = self._parse()
        size = dict(zip(letters, leaf.shape, strict=True))
        turned = leaf.transpose([letters.index(letter) for letter in "".join(groups)])
        return turned.reshape([math.prod(size[letter] for letter in group) for group in groups])

    def _parse(self) -> tuple[str, list[str]]:
        """Our axes as letters, and their axes as groups of letters: "DNH", ["NH", "D"]."""
        ours, theirs = self.axes.split(" -> ")
        groups = re.findall(r"\(.*?\)|\w", theirs)
        return ours.replace(" ", ""), [re.sub(r"\W", "", group) for group in groups]


@dataclass(frozen=True)
class Family:
    """How a family names its tensors.

    prefix: what all names but the head's begin with (files of a bare body leave it out).
    parts: our leaves by path. buffers: tensors of old files that are not weights.
    """

    prefix: str
    parts: dict[str, Part]
    buffers: re.Pattern

    def full_name(self, name: str) -> str:
        return name if name == HEAD else self.prefix + name


GPT2 = Family(  # matrices are [in, out]
    prefix="transformer.",
    parts={
        "tokens": Part("wte.weight", "V D -> V D"),
        "positions": Part("wpe.weight", "T D -> T D"),
        "blocks/attention_norm/scale": Part("h.{}.ln_1.weight", "D -> D"),
        "blocks/attention_norm/bias": Part("h.{}.ln_1.bias", "D -> D"),
        "blocks/attention/q/kernel": Part("h.{}.attn.c_attn.weight", "D N H -> D (N H)", third=0),
        "blocks/attention/k/kernel": Part("h.{}.attn.c_attn.weight", "D N H -> D (N H)", third=1),
        "blocks/attention/v/kernel": Part("h.{}.attn.c_attn.weight", "D N H -> D (N H)", third=2),
        "blocks/attention/q/bias": Part("h.{}.attn.c_attn.bias", "N H -> (N H)", third=0),
        "blocks/attention/k/bias": Part("h.{}.attn.c_attn.bias", "N H -> (N H)", third=1),
        "blocks/attention/v/bias": Part("h.{}.attn.c_attn.bias", "N H -> (N H)", third=2),
        "blocks/attention/o/kernel": Part("h.{}.attn.c_proj.weight", "N H D -> (N H) D"),
        "blocks/attention/o/bias": Part("h.{}.attn.c_proj.bias", "D -> D"),
        "blocks/mlp_norm/scale": Part("h.{}.ln_2.weight", "D -> D"),
        "blocks/mlp_norm/bias": Part("h.{}.ln_2.bias", "D -> D"),
        "blocks/mlp/up/kernel": Part("h.{}.mlp.c_fc.weight", "D F -> D F"),
        "blocks/mlp/up/bias": Part("h.{}.mlp.c_fc.bias", "F -> F"),
        "blocks/mlp/down/kernel": Part("h.{}.mlp.c_proj.weight", "F D -> F D"),
        "blocks/mlp/down/bias": Part("h.{}.mlp.c_proj.bias", "D -> D"),
        "final_norm/scale": Part("ln_f.weight", "D -> D"),
        "final_norm/bias": Part("ln_f.bias", "D -> D"),
        "head": Part(HEAD, "V D -> V D"),
    },
    buffers=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
)

LLAMA = Family(  # matrices are [out, in]
    prefix="model.",
    parts={
        "tokens": Part("embed_tokens.weight", "V D -> V D"),
        "blocks/attention_norm/scale": Part("layers.{}.input_layernorm.weight", "D -> D"),
        "blocks/attention/q/kernel": Part("layers.{}.self_attn.q_proj.weight", "D N H -> (N H) D"),
        "blocks/attention/k/kernel": Part("layers.{}.self_attn.k_proj.weight", "D K H -> (K H) D"),
        "blocks/attention/v/kernel": Part("layers.{}.self_attn.v_proj.weight", "D K H -> (K H) D"),
        "blocks/attention/q/bias": Part("layers.{}.self_attn.q_proj.bias", "N H -> (N H)"),
        "blocks/attention/k/bias": Part("layers.{}.self_attn.k_proj.bias", "K H -> (K H)"),
        "blocks/attention/v/bias": Part("layers.{}.self_attn.v_proj.bias", "K H -> (K H)"),
        "blocks/attention/q_norm/scale": Part("layers.{}.self_attn.q_norm.weight", "H -> H"),
        "blocks/attention/k_norm/scale": Part("layers.{}.self_attn.k_norm.weight", "H -> H"),
        "blocks/attention/o/kernel": Part("layers.{}.self_attn.o_proj.weight", "N H D -> D (N H)"),
        "blocks/attention/o/bias": Part("layers.{}.self_attn.o_proj.bias", "D -> D"),
        "blocks/mlp_norm/scale": Part("layers.{}.post_attention_layernorm.weight", "D -> D"),
        "blocks/mlp/gate/kernel": Part("layers.{}.mlp.gate_proj.weight", "D F -> F D"),
        "blocks/mlp/gate/bias": Part("layers.{}.mlp.gate_proj.bias", "F -> F"),
        "blocks/mlp/up/kernel": Part("layers.{}.mlp.up_proj.weight", "D F -> F D"),
        "blocks/mlp/up/bias": Part("layers.{}.mlp.up_proj.bias", "F -> F"),
        "blocks/mlp/down/kernel": Part("layers.{}.mlp.down_proj.weight", "F D -> D F"),
        "blocks/mlp/down/bias": Part("layers.{}.mlp.down_proj.bias", "D -> D"),
        "final_norm/scale": Part("norm.weight", "D -> D"),
        "head": Part(HEAD, "V D -> V D"),
    },
    buffers=re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)


@dataclass(frozen=True)
class Leaf:
    """One of our stacked leaves and the tensors that hold it, one per layer.

    layer_shape: what one tensor holds, without the rows that pad the vocabulary.
    names: the tensors' names without the family's prefix.
    """

    path: str
    shape: tuple[int, ...]
    layer_shape: tuple[int, ...]
    part: Part
    names: list[str]

    def layers(self, array: np.ndarray) -> np.ndarray:
        """The leaf with an axis of layers in front; a leaf outside the blocks has one."""
        return array if self.path.startswith("blocks/") else array[None]


def leaves_of(config: ModelConfig, family: Family) -> list[Leaf]:
    """All leaves of a model of `config`."""
    leaves = []
    for path, leaf in named_leaves(transformer.abstract(config)).items():
        part = family.parts[path]
        n_layers, layer_shape = 1, leaf.shape
        if path.startswith("blocks/"):
            n_layers, layer_shape = leaf.shape[0], leaf.shape[1:]
        elif path in ("tokens", "head"):
            layer_shape = (config.vocab_size, *leaf.shape[1:])
        names = [part.name.format(layer) for layer in range(n_layers)]
        leaves.append(Leaf(path, leaf.shape, layer_shape, part, names))
    return leaves


def tensor_shapes(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """Names (without the prefix) and shapes of the tensors that hold a model of `config`."""
    leaves = leaves_of(config, family)
    return {name: leaf.part.shape(leaf.layer_shape) for leaf in leaves for name in leaf.names}


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its header's entry, and how to read it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        # The file is opened for each tensor: its pages count as ours for as long as it is open.
        with open_safetensors(self.path) as file:
            return file.get_tensor(self.name)

    def sha256(self) -> bytes:
        return hashlib.sha256(self.read().view(np.uint8)).digest()


def open_safetensors(path: Path) -> safe_open:
    """An open safetensors file; its header has been checked against the file's size."""
    require(path.is_file(), f"{path} cannot be read: it is not a file")
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is damaged or not a safetensors file: {reason}") from None


def read_header(path: Path) -> dict[str, StoredTensor]:
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(path, name, str(one.get_dtype()), tuple(one.get_shape()))
            for name, one in slices.items()
        }


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's folder by name, from one file or from shards with an index.

    UserError if the folder has neither, or a file is damaged, or the shards do not hold what the
    index says. No tensor is read.
    """
    expected = f"expected a folder with config.json and {WEIGHTS} or its shards"
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.is_file() else f"no folder {folder}"
        raise UserError(f"{what}: {expected}{pickle_advice([folder])}")
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        advice = pickle_advice(folder.iterdir())
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}: {expected}{advice}")

    file_of = read_json(folder / INDEX).get("weight_map")
    require(isinstance(file_of, dict) and file_of, f"{folder / INDEX} has no weight_map")
    for name, file in file_of.items():
        # A plain name: the index of a stranger must not lead out of the folder.
        plain = isinstance(file, str) and re.fullmatch(r"[\w\-][\w.\-]*\.safetensors", file)
        require(
            plain, f"{folder / INDEX}: {name!r} is in {file!r}, expected a .safetensors file here"
        )
    tensors = {}
    for file in sorted(set(file_of.values())):
        for name, tensor in read_header(folder / file).items():
            if file_of.get(name) == file:
                tensors[name] = tensor
    missing = sorted(file_of.keys() - tensors.keys())
    require(not missing, f"{folder}: tensors of the index are in no file: {shorten(missing)}")
    return tensors


def pickle_advice(paths: Iterable[Path]) -> str:
    """What to do about weights in a pickle, if there are any among `paths`."""
    if not any(path.suffix in PICKLE_SUFFIXES for path in paths):
        return ""
    return (
        ". A pickle can run any program when it is opened, so none is opened here: if you trust "
        "it, load it with transformers and save it with model.save_pretrained(NEW_FOLDER)"
    )


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
    """The tensors of a model by their names without the prefix.

    UserError lists the tensors that are missing, unexpected, of another shape or not floats. A head
    stored beside a tied table must equal it.
    """
    # Before anything is computed from config.json's sizes: a damaged one may ask for 2^31 layers.
    require(
        config.n_layers <= len(stored) and flops.parameters(config) < 2**40,
        f"config.json describes {config.n_layers:,} layers and {flops.parameters(config):,} "
        f"weights, which {len(stored):,} tensors cannot hold",
    )
    tensors: dict[str, StoredTensor] = {}
    for full_name, tensor in stored.items():
        name = full_name.removeprefix(family.prefix)
        require(name not in tensors, f"{name} is there both with and without {family.prefix}")
        if not family.buffers.fullmatch(name):
            tensors[name] = tensor

    expected = tensor_shapes(config, family)
    tied_head = tensors.pop(HEAD, None) if config.tied else None
    both = expected.keys() & tensors.keys()
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "not expected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} is {list(tensors[name].shape)}, expected {list(expected[name])}"
            for name in sorted(both)
            if tensors[name].shape != expected[name]
        ],
        f"of a type other than {', '.join(FLOATS)}": [
            f"{name} ({tensors[name].dtype})"
            for name in sorted(both)
            if tensors[name].dtype not in FLOATS
        ],
    }
    listed = "; ".join(f"{what}: {shorten(names)}" for what, names in problems.items() if names)
    require(not listed, f"the tensors are not those that config.json describes: {listed}")

    if tied_head is not None:
        table = tensors[family.parts["tokens"].name]
        alike = tied_head.dtype == table.dtype and tied_head.shape == table.shape
        require(
            alike and tied_head.sha256() == table.sha256(),  # one of them in memory at a time
            f"config.json ties the head to the embedding, but {HEAD} differs from it: set "
            "tie_word_embeddings to false if the head is meant to be its own",
        )
    return tensors


def param_dtype_of(tensors: dict[str, StoredTensor]) -> Dtype:
    """The type in which the weights are kept: float16 and mixed types become float32."""
    return "bfloat16" if all(one.dtype == "BF16" for one in tensors.values()) else "float32"


def read_params(
    config: ModelConfig, family: Family, tensors: dict[str, StoredTensor]
) -> dict[str, Any]:
    """All weights as stacked arrays on the first device; UserError if one is not finite."""
    # For a moment there are two copies of a leaf, and one of its tensors. The leaves that need most
    # come first, while memory is empty.
    leaves = leaves_of(config, family)
    leaves.sort(key=lambda leaf: -math.prod(leaf.shape) - math.prod(leaf.layer_shape))
    params: dict[str, Any] = {}
    for leaf in leaves:
        *parents, key = leaf.path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        array = read_leaf(leaf, tensors, PARAM_DTYPES[config.param_dtype])
        node[key] = jax.block_until_ready(jax.device_put(array))
    return params


def read_leaf(leaf: Leaf, tensors: dict[str, StoredTensor], dtype: np.dtype) -> np.ndarray:
    """One stacked leaf, from a tensor per layer; rows that pad the vocabulary are zero."""
    array = np.empty(leaf.shape, dtype)
    rows = leaf.layer_shape[0]
    for in_layer, name in zip(leaf.layers(array), leaf.names, strict=True):
        in_layer[:rows] = leaf.part.to_ours(tensors[name].read(), leaf.layer_shape)
        in_layer[rows:] = 0
        finite = bool(np.isfinite(in_layer).all())
        require(finite, f"{name} holds NaN or infinity: these weights are damaged")
    return array


# ---------------------------------------------------------------- writing


def to_tensors(
    config: ModelConfig, family: Family, params: Any, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Their tensors in the order of `tensor_shapes(config, family)`, from our stacked `params`.

    A bias that `config` has and `params` lacks becomes zeros.
    """
    arrays = named_leaves(params)
    sources: dict[str, list[tuple[Leaf, int]]] = {}
    for leaf in leaves_of(config, family):
        for layer, name in enumerate(leaf.names):
            sources.setdefault(name, []).append((leaf, layer))

    for leaves in sources.values():
        thirds = {}
        for leaf, layer in leaves:
            if leaf.path in arrays:
                in_layer = leaf.layers(np.asarray(arrays[leaf.path]))[layer]
                in_layer = in_layer[: leaf.layer_shape[0]].astype(dtype)
            else:
                in_layer = np.zeros(leaf.layer_shape, dtype)
            thirds[leaf.part.third or 0] = leaf.part.to_theirs(in_layer)
        if len(thirds) == 1:
            yield thirds[0]
        else:
            yield np.concatenate([thirds[i] for i in range(3)], axis=-1)


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
