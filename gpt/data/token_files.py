"""Memory-mapped tokens on disk: our own shards, llm.c's and modded-nanogpt's, and nanoGPT's.

One of our folders holds shards of ids (little-endian uint16, or uint32 for a large vocabulary), the
tokenizer that made them, and `tokens.json`, which describes them. Independent of batches and JAX.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import filesize

from gpt.data import tokenizers
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError, require
from gpt.wording import counted

HEADER = "tokens.json"
VERSION = 3
DAMAGED = "the tokens in {folder} are damaged: delete the folder and they will be made again"
SPLITS = {"train": "training", "val": "validation"}  # name in file names: name in messages

# llm.c's shards start with 256 integers: one of these keys, the version, the number of ids. The
# values are the version and the type of the ids. modded-nanogpt writes the first kind.
LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
LLMC_HEADER = 256 * 4  # bytes
SAMPLE_CHUNKS = 64  # read from a file to check its tokens
SAMPLE_CHUNK = 2**14  # tokens in each
HELD_OUT = 0.05  # of other projects' tokens without a validation file
SPLIT_NAME = re.compile(r"(?:^|[-_.])(train|val|valid|validation)(?:[-_.]|$)")


class Tokens:
    """One split: memory-mapped shards read as one array of ids, and its text's number of bytes."""

    def __init__(self, shards: Sequence[np.ndarray], n_bytes: int):
        self.shards = shards
        self.n_bytes = n_bytes
        self.ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """The ids of a slice without a step."""
        start, stop, _ = where.indices(len(self))
        number = int(np.searchsorted(self.ends, start, "right"))
        parts = [self.shards[0][:0]]
        while start < stop:
            end = int(self.ends[number])
            before = end - len(self.shards[number])
            parts.append(self.shards[number][start - before : stop - before])
            start = end
            number += 1
        return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several sources to train on, and each one's share of the batches; the shares sum to 1."""

    sources: list[Tokens]
    weights: list[float]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Both splits. The fingerprint changes with any of their tokens.

    files: a digest of each file they were made from, by name.
    """

    train: Tokens | Mixture
    val: Tokens
    fingerprint: str
    files: dict[str, str] = field(default_factory=dict)


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """uint16 if it holds every id, else uint32; little-endian."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")


def hash_file(path: Path) -> str:
    """A file's SHA-256 in hex; UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


# ------------------------------------------------------------ our own tokens


def is_prepared(path: Path) -> bool:
    """Whether `path` is a folder of our token shards."""
    return (path / HEADER).is_file()


def read_header(folder: Path) -> dict[str, Any]:
    """The contents of a folder's tokens.json; UserError if it is damaged."""
    damaged = DAMAGED.format(folder=folder)
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        require(header["version"] == VERSION, f"{damaged}: {HEADER} is not version {VERSION}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{damaged}: {HEADER} cannot be read ({error!r})") from None
    return header


def describe(folder: Path, is_kept: bool = True) -> str:
    """A line of the plan about one of our folders: its tokens, their origin, place and size."""
    header = read_header(folder)
    n_train, n_val = (header["splits"][split]["tokens"] for split in SPLITS)
    size = (n_train + n_val) * np.dtype(header["dtype"]).itemsize
    separator = header["separator"]
    ends = f" ({separator!r} ends one too)" if separator else ""
    place = f"in {folder}" if is_kept else "made again when training starts"
    line = (
        f"tokens         {n_train:,} to train on and {n_val:,} held out, of "
        f"{counted(header['documents'], 'document')}{ends}, fingerprint "
        f"{header['fingerprint'][:12]}, {place}, {filesize.decimal(size)}"
    )
    if header["bad_documents"]:
        line += (
            f"\nskipped        {counted(header['bad_documents'], 'document')} that cannot be read, "
            f"the first: {header['first_bad']}"
        )
    return line


def open_shards(folder: Path, tokenizer: Tokenizer, verify: bool = False) -> dict[str, Tokens]:
    """The non-empty splits of one of our folders.

    verify: hash every shard. UserError if the folder is damaged or from another tokenizer.
    """
    damaged = DAMAGED.format(folder=folder)
    header = read_header(folder)
    require(
        header["tokenizer_digest"] == tokenizers.digest(tokenizer),
        f"the tokens in {folder} were made by another tokenizer: "
        f"pass --tokenizer {folder / 'tokenizer.json'}",
    )
    found = {}
    for split in SPLITS:
        arrays = []
        for shard in header["splits"][split]["shards"]:
            array = map_tokens(folder / shard["file"], token_type(tokenizer))
            is_whole = len(array) == shard["tokens"]
            require(is_whole, f"{damaged}: {shard['file']} is not {shard['tokens']} tokens long")
            if verify:
                is_same = hash_file(folder / shard["file"]) == shard["sha256"]
                require(is_same, f"{damaged}: {shard['file']} has changed")
            arrays.append(array)
        if arrays:
            found[split] = Tokens(arrays, header["splits"][split]["text_bytes"])
    return found


def map_tokens(path: Path, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """A file's ids after `offset` bytes, memory-mapped; UserError if it has none."""
    try:
        size = path.stat().st_size - offset
        whole = size % dtype.itemsize == 0 and size > 0
        require(whole, f"{path} is {size + offset} bytes long: expected {dtype.name} tokens")
        return np.asarray(np.memmap(path, dtype, mode="r", offset=offset))
    except OSError as error:
        raise UserError(f"cannot read the tokens in {path}: {error}") from None


# ------------------------------------------------------------ other projects' tokens


def find_shards(paths: Sequence[Path]) -> list[Path]:
    """The token shards of llm.c, modded-nanogpt or nanoGPT at `paths`; none unless all are shards.

    A path names a .bin file of ids, or a folder whose .bin files are all named after a split.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.bin"))
            if not inside or not all(SPLIT_NAME.search(file.stem) for file in inside):
                return []
            found += inside
        elif path.suffix == ".bin" and path.is_file() and holds_ids(path):
            found.append(path)
        else:
            return []
    return found


def holds_ids(path: Path) -> bool:
    """Whether a .bin file holds tokens, not text, judged by llm.c's header or zero bytes."""
    with path.open("rb") as file:
        head = file.read(2**12)
    return int.from_bytes(head[:4], "little") in LLMC or b"\0" in head


def open_others(
    paths: Sequence[Path], tokenizer: Tokenizer, share: float | None, verify: bool = False
) -> tuple[dict[str, Tokens], str]:
    """The splits of other projects' token shards, and a fingerprint of a sample of them.

    A file belongs to the split in its name, else to training. Without a validation file, the
    last `share` of all tokens is held out. verify: check all tokens instead of a sample. Raises
    UserError if a token is not in the tokenizer's vocabulary.
    """
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    lengths[tokenizer.eot_token] = 0
    arrays: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    n_bytes = 0.0
    fingerprint = hashlib.sha256()
    for path in paths:
        array = open_shard(path, tokenizer)
        sample = take_sample(array)
        largest = int((array if verify else sample).max())
        require(
            largest < tokenizer.n_vocab,
            f"{path} holds token {largest}, but {tokenizer.name} has only {tokenizer.n_vocab}: "
            "pass the tokenizer that made it with --tokenizer",
        )
        fingerprint.update(f"{len(array)} {sample.dtype.name} ".encode())
        fingerprint.update(sample)
        n_bytes += lengths[sample].mean() * len(array)
        named = SPLIT_NAME.search(path.stem)
        arrays["val" if named and named[1] != "train" else "train"].append(array)

    # Without a validation file, hold out the last training tokens.
    if not arrays["val"] and share != 0:
        n_train = sum(len(array) for array in arrays["train"])
        left = int(n_train * (1 - (HELD_OUT if share is None else share)))
        for array in arrays.pop("train"):
            arrays.setdefault("train", []).append(array[:left])
            arrays["val"].append(array[left:])
            left = max(left - len(array), 0)
    counts = {split: sum(len(array) for array in arrays[split]) for split in SPLITS}
    require(counts["train"] > 0 or share == 1, f"{paths[0].parent} holds no tokens to train on")
    found = {}
    for split, count in counts.items():
        if count:
            n_bytes_here = round(n_bytes * count / sum(counts.values()))
            found[split] = Tokens(arrays[split], n_bytes_here)
    return found, fingerprint.hexdigest()


def open_shard(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """A shard's ids. Their type is in llm.c's header, or is guessed from the ids."""
    with path.open("rb") as file:
        magic, version, count = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4").tolist()
    if magic in LLMC:
        expected, dtype = LLMC[magic]
        require(
            version == expected,
            f"{path} is version {version} of llm.c's tokens: expected version {expected}",
        )
        array = map_tokens(path, np.dtype(dtype), LLMC_HEADER)
        require(
            len(array) == count,
            f"{path} is damaged: it holds {len(array):,} tokens, but its header says {count:,}",
        )
        return array

    # nanoGPT's shards have no header. Ids read as a type half their size alternate with zeros.
    for name in ("<u2", "<u4", "<u8"):
        dtype = np.dtype(name)
        if dtype.itemsize < token_type(tokenizer).itemsize:
            continue
        array = map_tokens(path, dtype)
        if len(array) < 4 or take_sample(array)[1::2].any():
            break
    return array


def take_sample(array: np.ndarray) -> np.ndarray:
    """Up to a million ids, in chunks spread evenly over the file."""
    if len(array) <= SAMPLE_CHUNKS * SAMPLE_CHUNK:
        return np.array(array)
    starts = np.linspace(0, len(array) - SAMPLE_CHUNK, SAMPLE_CHUNKS).astype(np.int64) // 2 * 2
    return np.concatenate([array[start : start + SAMPLE_CHUNK] for start in starts])
