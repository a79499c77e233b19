"""Tokens on disk: text encoded once into two memory-mapped files, train.bin and val.bin.

A folder of shards holds both (little-endian uint16, or uint32 where the vocabulary is larger),
`tokens.json`, which says what they are, and the tokenizer that made them. nanoGPT's folders are
read as well: the same two files with no header. Knows nothing of batches or JAX.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from gpt.data import tokenizers
from gpt.data.corpus import PIECE, Corpus
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError, require

HEADER = "tokens.json"
VERSION = 1
SPLITS = {"train": "training", "val": "validation"}  # names of the files, and what they are for
MIN_DOCUMENTS = 20  # with at least this many, whole documents are held out
HELD_OUT_DOCUMENTS = 0.05  # fraction of the documents, where there are many
HELD_OUT_TAIL = 0.1  # fraction of the characters, where there are few
THREADS = min(os.cpu_count() or 1, 16)
SAMPLE = 2**26  # tokens checked in a file that has no header

Progress = Callable[[int, int], None]
Part = tuple[str, str, bool]  # split, text, whether a document ends here


@dataclass(frozen=True, eq=False)
class Tokens:
    """One split: memory-mapped ids, and the bytes of the text they stand for."""

    array: np.ndarray
    n_bytes: int

    def __len__(self) -> int:
        return len(self.array)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Both splits; the fingerprint changes with any of their tokens."""

    train: Tokens
    val: Tokens
    fingerprint: str


def fingerprint_of(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """The fingerprint that the dataset of this text and tokenizer has, without making it."""
    key = f"{VERSION} {corpus.fingerprint} {tokenizers.digest(tokenizer)}"
    return hashlib.sha256(key.encode()).hexdigest()


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, cache_folder: Path, progress: Progress | None = None
) -> Dataset:
    """The corpus as tokens, read from `cache_folder` if they were made there before.

    End-of-text follows each document, unless there is only one. Where there are many, one in
    twenty is held out, chosen by a hash of its content; otherwise the last tenth of all characters.
    `progress` is called now and then with the bytes of text done and the total. UserError if the
    text is too small for two splits, or the folder cannot be written.
    """
    fingerprint = fingerprint_of(corpus, tokenizer)
    folder = cache_folder / fingerprint[:32]
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        # One process tokenizes, and others that want the same tokens wait for it.
        with (
            FileLock(cache_folder / f".{folder.name}.lock"),
            tempfile.TemporaryDirectory(dir=cache_folder, prefix=".unfinished-") as unfinished,
        ):
            if not (folder / HEADER).is_file():
                # Filled under another name, so that it is there whole or not at all.
                made = Path(unfinished) / folder.name
                made.mkdir()
                header = {
                    "version": VERSION,
                    "text": corpus.description,
                    "fingerprint": fingerprint,
                    "vocab_size": tokenizer.n_vocab,
                    "tokenizer_digest": tokenizers.digest(tokenizer),
                    "dtype": token_type(tokenizer).name,
                    "splits": write_tokens(corpus, tokenizer, made, progress),
                }
                tokenizers.save(tokenizer, made / "tokenizer.json")
                (made / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
                made.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write tokens to {cache_folder}: {error}") from None
    return open_shards(folder, tokenizer)


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """uint16 if it holds every id, else uint32; little-endian."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")


def write_tokens(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: Progress | None
) -> dict[str, dict[str, int]]:
    """Encode the corpus into train.bin and val.bin; the tokens and bytes of text in each."""
    counts = {split: {"tokens": 0, "text_bytes": 0} for split in SPLITS}
    dtype = token_type(tokenizer)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        done = 0
        for group in groups(assign(corpus), THREADS * PIECE):
            texts = [text for _, text, _ in group]
            # No variable holds all the ids, so they are freed before the next group is encoded.
            for ids, (split, text, last) in zip(
                tokenizer.encode_ordinary_batch(texts, num_threads=THREADS), group, strict=True
            ):
                if last and corpus.n_documents > 1:
                    ids.append(tokenizer.eot_token)
                files[split].write(np.array(ids, dtype))
                n_bytes = len(text.encode())
                counts[split]["tokens"] += len(ids)
                counts[split]["text_bytes"] += n_bytes
                done += n_bytes
            if progress:
                progress(done, corpus.size_bytes)
    require(done == corpus.size_bytes, "the text changed while it was read: start again")
    for split, purpose in SPLITS.items():
        require(
            counts[split]["tokens"] >= 2,
            f"the text is too small: its {sum(corpus.lengths):,} characters leave fewer than two "
            f"tokens for {purpose}, give it more text",
        )
    return counts


def assign(corpus: Corpus) -> Iterator[Part]:
    """Every piece of the corpus, in order, with its split."""
    # Whole documents are held out, unless there are few or they are a poor sample. The choice
    # depends on their content alone: a corpus that grows moves none of them into training.
    held_out = np.array(corpus.hashes, np.uint64) < np.uint64(HELD_OUT_DOCUMENTS * 2**64)
    lengths = np.array(corpus.lengths)
    is_fair = 0.01 <= lengths[held_out].sum() / lengths.sum() <= 0.2
    by_document = corpus.n_documents >= MIN_DOCUMENTS and is_fair

    cut = int(sum(corpus.lengths) * (1 - HELD_OUT_TAIL))
    document = 0  # number of the one at hand
    position = 0  # characters before the piece at hand
    for text, last in corpus.pieces():
        head = cut - position  # characters of this piece before the cut
        if by_document:
            yield ("val" if held_out[document] else "train"), text, last
        elif head <= 0:
            yield "val", text, last
        elif head >= len(text):
            yield "train", text, last
        else:
            yield "train", text[:head], False
            yield "val", text[head:], last
        position += len(text)
        if last:
            document += 1


def groups(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    """Consecutive parts, together about `size` characters."""
    group = []
    length = 0
    for part in parts:
        group.append(part)
        length += len(part[1])
        if length >= size:
            yield group
            group = []
            length = 0
    if group:
        yield group


def is_prepared(path: Path) -> bool:
    """Whether `path` is a folder of token shards, ours or nanoGPT's."""
    shards = all((path / f"{split}.bin").is_file() for split in SPLITS)
    return shards or (path / HEADER).is_file()


def open_shards(folder: Path, tokenizer: Tokenizer) -> Dataset:
    """The dataset `tokenize` wrote; UserError if it is damaged or another tokenizer made it."""
    damaged = f"the tokens in {folder} are damaged, delete the folder to have them made again"
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        version = header["version"]
        fingerprint = header["fingerprint"]
        tokenizer_digest = header["tokenizer_digest"]
        counts = {split: header["splits"][split]["tokens"] for split in SPLITS}
        n_bytes = {split: header["splits"][split]["text_bytes"] for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{damaged}: {HEADER} cannot be read ({error!r})") from None
    require(version == VERSION, f"{damaged}: {HEADER} is not version {VERSION} of its format")
    require(
        tokenizer_digest == tokenizers.digest(tokenizer),
        f"the tokens in {folder} were made by another tokenizer: "
        f"pass --tokenizer {folder / 'tokenizer.json'}",
    )
    splits = {}
    for split, count in counts.items():
        tokens = map_tokens(folder / f"{split}.bin", token_type(tokenizer))
        require(len(tokens) == count, f"{damaged}: {split}.bin is not {count} tokens long")
        splits[split] = Tokens(tokens, n_bytes[split])
    return Dataset(**splits, fingerprint=fingerprint)


def map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    """The ids in a file, mapped into memory; UserError if it cannot hold at least two."""
    try:
        size = path.stat().st_size
        whole = size % dtype.itemsize == 0 and size >= 2 * dtype.itemsize
        require(whole, f"{path} is {size} bytes long: expected at least two {dtype.name} tokens")
        return np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise UserError(f"cannot read the tokens in {path}: {error}") from None


def open_headerless(folder: Path, tokenizer: Tokenizer) -> Dataset:
    """A folder of nanoGPT's: uint16 ids, a sample of which is checked against the vocabulary."""
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    lengths[tokenizer.eot_token] = 0
    splits = {}
    digest = hashlib.sha256()
    for split in SPLITS:
        array = map_tokens(folder / f"{split}.bin", np.dtype("<u2"))
        sample = array[:: 1 + len(array) // SAMPLE]
        require(
            int(sample.max()) < tokenizer.n_vocab,
            f"{folder / split}.bin holds token {int(sample.max())}, but {tokenizer.name} has only "
            f"{tokenizer.n_vocab}: pass the tokenizer that made it with --tokenizer",
        )
        n_bytes = int(lengths[sample].sum() * len(array) / len(sample))
        splits[split] = Tokens(array, n_bytes)
        digest.update(f"{len(array)} ".encode())
        digest.update(sample)
    return Dataset(**splits, fingerprint=digest.hexdigest())
