"""Tensors to our weights and back, one at a time. Every one is used once, and none is missing.

Knows neither config.json nor checkpoints.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from gpt import flops
from gpt.checkpoint import named_leaves
from gpt.config import Dtype, ModelConfig
from gpt.convert.layout import HEAD, Family, layers_of, leaf_shapes, one_layer, tensor_shapes
from gpt.convert.tensorfile import FLOATS, Stored, some
from gpt.errors import UserError, require

TABLE = ("wte.weight", "embed_tokens.weight")
MOST_WEIGHTS = 2**40  # what no file here can hold
shapes_of = functools.lru_cache(leaf_shapes)
DTYPES: dict[Dtype, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Source:
    """The tensors of a model that has been proved to be whole, by their names in `family`."""

    config: ModelConfig
    family: Family
    tensors: dict[str, Stored]

    def leaves(self) -> list[str]:
        """Paths of our leaves, the largest first: at the end there is least room for two of one."""
        shapes = shapes_of(self.config)
        return sorted(shapes, key=lambda path: -np.prod(shapes[path], dtype=float))

    def read(self, path: str) -> np.ndarray:
        """One of our leaves, each tensor of it read once; UserError if it is not all finite."""
        shape, part = shapes_of(self.config)[path], self.family.parts[path]
        ours = one_layer(self.config, path, shape)
        out = np.empty(shape, DTYPES[self.config.param_dtype])
        rows = out if path.startswith("blocks/") else out[None]
        for i in layers_of(self.config, path):
            name = part.name.format(i)
            rows[i][: ours[0]] = part.take(self.tensors[name].map(), ours)
            rows[i][ours[0] :] = 0  # padding of the vocabulary
            finite = bool(np.isfinite(rows[i]).all())
            require(finite, f"{name} holds NaN or infinity: these weights are damaged")
        return out


def match(config: ModelConfig, family: Family, stored: dict[str, Stored]) -> Source:
    """The weights of `config` among `stored`; UserError lists what is missing, left over or wrong.

    Names may bear the family's prefix or not. A head beside a tied table must equal it.
    """
    require(
        config.n_layers <= len(stored) and flops.parameters(config) <= MOST_WEIGHTS,
        f"config.json describes {config.n_layers:,} layers and {flops.parameters(config):,} "
        f"weights: not those of these {len(stored):,} tensors",
    )
    tensors = without_prefix(family, stored)
    expected = tensor_shapes(config, family)
    tied_head = tensors.pop(HEAD, None) if config.tied else None
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    lists = {"missing": missing, "not expected": unknown, "of another shape": wrong}
    told = "; ".join(f"{what}: {some(names)}" for what, names in lists.items() if names)
    require(not told, f"the tensors are not those that config.json describes: {told}")
    types = {name: one.dtype for name, one in tensors.items() if one.dtype not in FLOATS}
    require(
        not types,
        f"tensors of types other than {', '.join(FLOATS)}: "
        + some(f"{name} ({dtype})" for name, dtype in types.items()),
    )
    if tied_head:
        require_same(tied_head, tensors[next(name for name in TABLE if name in tensors)])
    half = all(one.dtype == "BF16" for one in tensors.values())
    return Source(replace(config, param_dtype="bfloat16" if half else "float32"), family, tensors)


def without_prefix(family: Family, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Tensors by the names that the family's table has; buffers, which are no weights, left out."""
    tensors: dict[str, Stored] = {}
    for name, one in stored.items():
        short = name.removeprefix(family.prefix)
        require(short not in tensors, f"{short} is there twice, with {family.prefix} and without")
        if not re.fullmatch(family.buffers, short):
            tensors[short] = one
    return tensors


def require_same(head: Stored, table: Stored) -> None:
    """UserError unless a tied model's stored head is its table, as it claims."""
    same = head.dtype == table.dtype and head.shape == table.shape
    if not (same and np.array_equal(head.map().view(np.uint8), table.map().view(np.uint8))):
        raise UserError(
            "config.json ties the head to the embedding, but lm_head.weight differs from it: set "
            "tie_word_embeddings to false if the head is meant"
        )


def tensors_of(
    config: ModelConfig, family: Family, params: Any, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Their tensors, in the order of `tensor_shapes(config, family)`, from our stacked `params`.

    A bias that `params` has not is zeros.
    """
    leaves, shapes = named_leaves(params), leaf_shapes(config)
    parts: dict[str, list[tuple[str, int]]] = {}
    for path in shapes:
        for i in layers_of(config, path):
            parts.setdefault(family.parts[path].name.format(i), []).append((path, i))
    for places in parts.values():
        ordered = sorted(places, key=lambda place: family.parts[place[0]].third or 0)
        found = [cut(config, path, i, leaves.get(path), shapes[path], dtype) for path, i in ordered]
        yield family.parts[ordered[0][0]].give(*found)


def cut(config: ModelConfig, path: str, layer: int, leaf, shape, dtype: np.dtype) -> np.ndarray:
    """One layer of a leaf, without padding, in the type that is asked for."""
    ours = one_layer(config, path, shape)
    if leaf is None:
        return np.zeros(ours, dtype)
    whole = np.asarray(leaf)
    return (whole[layer] if path.startswith("blocks/") else whole)[: ours[0]].astype(dtype)
