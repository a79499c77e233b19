"""safetensors files: the header is proved before a byte of data is touched, tensors are mapped.

The format: 8 bytes that hold the header's length N, N bytes of JSON, then the data. Knows nothing
of models. https://huggingface.co/docs/safetensors
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gpt.convert import strict_json
from gpt.errors import UserError, require

FLOATS = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
SIZES = {name: dtype.itemsize for name, dtype in FLOATS.items()}
SIZES |= {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2}
SIZES |= {"U32": 4, "I32": 4, "U64": 8, "I64": 8, "F64": 8}  # of masks and counters, never read
MOST_HEADER = 16 * strict_json.MEGABYTE  # a hundred thousand tensors
MOST_AXES = 8
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: a file, the place of its first byte, its type and shape."""

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    def map(self) -> np.ndarray:
        """The tensor, read from the disk where it is looked at; the map goes with the array."""
        try:
            dtype = FLOATS[self.dtype]
            return np.memmap(self.path, dtype, "r", offset=self.start, shape=self.shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from None


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model's folder by name: of one file, or of shards and their index."""
    require(
        not folder.is_file(),
        f"{folder} is a file: expected a folder with config.json and {WHOLE}"
        + ("; " + how_to_convert(folder) if folder.suffix in PICKLES else ""),
    )
    require(folder.is_dir(), f"no folder {folder}: expected one with config.json and {WHOLE}")
    if (folder / WHOLE).exists():
        return open_file(folder / WHOLE)
    if (folder / INDEX).exists():
        return open_shards(folder)
    pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    require(not pickled, how_to_convert(*pickled[:1]))
    raise UserError(f"{folder} holds neither {WHOLE} nor {INDEX}: expected a model's folder")


def how_to_convert(path: Path = Path()) -> str:
    """What to do about weights in Python's own format."""
    return (
        f"{path.name} is a pickle, which may run any program when it is read, and is never opened: "
        "where you trust it, load it with transformers and save it with "
        "model.save_pretrained(NEW_FOLDER), which writes safetensors"
    )


def open_shards(folder: Path) -> dict[str, Stored]:
    """Every tensor that the index names, each in the file that it says and in no other."""
    index = strict_json.read(folder / INDEX, MOST_HEADER).get("weight_map")
    require(isinstance(index, dict) and index != {}, f"{folder / INDEX} has no weight_map")
    files = set()
    for name, file in index.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and is_plain(file)
        require(
            plain and is_plain(name),
            f"{folder / INDEX}: {name[:60]!r} lies in {str(file)[:60]!r}: expected the name of a "
            "safetensors file beside it",
        )
        files.add(file)
    found: dict[str, Stored] = {}
    for file in sorted(files):
        tensors = open_file(folder / file)
        for name in tensors:
            told = index.get(name)
            require(told == file, f"{folder / file} holds {name}, which the index puts in {told}")
        found |= tensors
    missing = sorted(index.keys() - found.keys())
    require(not missing, f"{folder}: the index names tensors that no file has: {some(missing)}")
    return found


def is_plain(name: str) -> bool:
    """Whether a tensor or a file may be called so: nothing that climbs, or breaks a line."""
    return NAME.fullmatch(name) is not None and ".." not in name


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def open_file(path: Path) -> dict[str, Stored]:
    """Every tensor of one file; UserError unless its header describes exactly what it holds."""
    require(path.is_file(), f"{path} cannot be read: it is no file")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header, start = read_header(file, size, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    about = header.pop("__metadata__", {})
    texts = isinstance(about, dict) and all(isinstance(text, str) for text in about.values())
    require(texts, f"{path} is damaged: its __metadata__ is not text")
    ends = {name: read_entry(path, name, entry) for name, entry in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(ends.items(), key=lambda item: item[1][2:]):
        require(
            begin == at,
            f"{path} is damaged: {name} begins at byte {begin:,} of the data, expected {at:,}: "
            "tensors overlap or leave a hole",
        )
        at = end
    there = size - start
    require(at == there, f"{path} is damaged: it describes {at:,} bytes of data and has {there:,}")
    return {n: Stored(path, start + begin, *kind) for n, (*kind, begin, _) in ends.items()}


def read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON, and where the data begin."""
    n = int.from_bytes(file.read(8), "little")
    require(
        size >= 10 and n <= min(size - 8, MOST_HEADER),
        f"{path} is no safetensors file or is cut short: {size:,} bytes with a header of {n:,}",
    )
    return strict_json.parse(file.read(n), f"the header of {path}"), 8 + n


def read_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first byte and end of one tensor, in itself without contradiction."""
    require(
        is_plain(name),
        f"{path} is damaged: a tensor is called {name[:60]!r}",
    )
    whole = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    require(whole, f"{path} is damaged: {name} has not just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(dtype, str) and dtype in SIZES
    require(known, f"{path}: {name} is of the unknown type {str(dtype)[:60]!r}")
    counts = all(isinstance(v, list) and len(v) <= MOST_AXES for v in (shape, offsets))
    counts = counts and len(offsets) == 2 and all(type(n) is int for n in shape + offsets)
    require(
        counts and all(0 <= n < 2**62 for n in shape + offsets),
        f"{path} is damaged: {name} has an impossible shape or place",
    )
    begin, end = offsets
    expected = math.prod(shape) * SIZES[dtype]
    require(
        end - begin == expected,
        f"{path} is damaged: {name} has {end - begin:,} bytes, its shape asks for {expected:,}",
    )
    return dtype, tuple(shape), begin, end


def write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, tensors: Iterable[np.ndarray]
) -> None:
    """Write `tensors`, one after the other as they come, under the names and shapes of `shapes`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are to begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, shape in zip(tensors, shapes.values(), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"a tensor of {tensor.shape} where {shape} was announced")
            flat = np.ascontiguousarray(tensor, FLOATS[dtype]).reshape(-1)
            file.write(flat.view(np.uint8).data)
