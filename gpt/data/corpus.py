"""Text to train on: found in files and folders, read in order, in pieces of bounded size.

Knows nothing of tokens. Text is whatever decodes as UTF-8 and holds no zero byte: plain files of
any extension, `.jsonl` files with a `text` field on each line, and either of them gzipped. It is
read twice on purpose: once to measure it and take its fingerprint, once to use it.
"""

import gzip
import hashlib
import io
import json
import os
import platform
import sysconfig
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.data.tokenizers import without_lone_surrogates
from gpt.errors import require

PIECE = 2**20  # characters read at once; no piece of a text is twice as long
UNREADABLE = (ValueError, OSError, EOFError, RecursionError, zlib.error)
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NamedFile = tuple[Path, str]
EXPECTED = "expected UTF-8 text, .jsonl with a text field on each line, or .gz of either"


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents in a fixed order.

    files: each with its path from the folder the user named, that folder's name first: it decides
        the fingerprint, so it is the same wherever the folder lies.
    skipped: names of the files in folders that are not text.
    fingerprint: SHA-256 in hex of names and contents.
    hashes: 64 bits of each document's SHA-256.
    lengths: characters in each document.
    size_bytes: bytes of the text in UTF-8.
    """

    description: str
    files: list[NamedFile]
    skipped: list[str]
    fingerprint: str
    hashes: array
    lengths: array
    size_bytes: int

    @property
    def n_documents(self) -> int:
        """Documents with any text in them."""
        return len(self.hashes)

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text in order, about a megabyte at a time, and whether a document ends with it."""
        for path, _ in self.files:
            yield from read_pieces(path)

    def documents(self) -> Iterator[str]:
        """The texts in order, long ones in pieces of about a megabyte cut at line ends."""
        for text, _ in self.pieces():
            yield text


def read_corpus(paths: Sequence[Path | str]) -> Corpus:
    """The text of files and folders; hidden files in folders are passed over.

    Files in folders that are not text are skipped and listed in `skipped`. UserError for a path
    that is missing, a named file that is empty or not text, and a folder without any text.
    """
    origins = [Path(path) for path in paths]
    files = [file for origin in origins for file in find(origin)]
    corpus = measure(files, ", ".join(str(path) for path in origins), named=set(origins))
    for origin in origins:
        used = any(path.is_relative_to(origin) for path, _ in corpus.files)
        require(used, f"{origin} holds no text: {EXPECTED}")
    return corpus


def standard_library() -> Corpus:
    """The source of the running Python's own standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not NOT_LIBRARY & set(Path(name).parts)]
    title = f"the source text of Python {platform.python_version()}'s standard library"
    return measure([(root / name, name) for name in names], title, named=set())


def find(origin: Path) -> list[NamedFile]:
    """The file `origin`, or the visible files below the folder `origin`, sorted by name.

    What training runs have written there is left out.
    """
    require(
        os.path.exists(origin), f"{origin} does not exist: {EXPECTED}, or a folder of such files"
    )
    if not origin.is_dir():
        return [(origin, origin.name)]
    found = []
    for folder, inside, files in os.walk(origin):
        if {"checkpoints", "tokenizer.json"} <= {*inside, *files}:
            inside.clear()  # a run's folder changes as it trains
            continue
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    found = [path for path in found if path.is_file()]  # reading a pipe would never end
    names = sorted(path.relative_to(origin).as_posix() for path in found)
    return [(origin / name, f"{origin.resolve().name}/{name}") for name in names]


def measure(files: list[NamedFile], title: str, named: set[Path]) -> Corpus:
    """The corpus of those `files` that hold text; UserError if one of the `named` does not."""
    used = []
    skipped = []
    hashes = array("Q")
    lengths = array("Q")
    total_bytes = 0
    fingerprint = hashlib.sha256()
    for path, name in files:
        n_before = len(hashes)
        size_bytes = 0
        contents = hashlib.sha256()
        try:
            for digest, length, n_bytes in measure_documents(path):
                hashes.append(int.from_bytes(digest[:8], "little"))
                lengths.append(length)
                size_bytes += n_bytes
                contents.update(digest)
        except UNREADABLE as error:
            reason = str(error)
            if isinstance(error, UnicodeDecodeError):
                reason = f"bytes that are not valid UTF-8, {error.object[error.start]:#04x} first"
            require(path not in named, f"{path} cannot be read as text ({reason}): {EXPECTED}")
            skipped.append(name)
            del hashes[n_before:], lengths[n_before:]
            continue
        if len(hashes) > n_before:
            used.append((path, name))
            total_bytes += size_bytes
            line = f"{len(name)} {name} {contents.hexdigest()}\n"
            fingerprint.update(line.encode("utf-8", "replace"))
    count = "1 file" if len(used) == 1 else f"{len(used):,} files"
    return Corpus(
        description=f"{title}: {count}, {total_bytes / 1e6:.1f} MB",
        files=used,
        skipped=skipped,
        fingerprint=fingerprint.hexdigest(),
        hashes=hashes,
        lengths=lengths,
        size_bytes=total_bytes,
    )


def measure_documents(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """The SHA-256, characters and bytes of each document in a file; UNREADABLE if not text."""
    digest = hashlib.sha256()
    length = 0
    n_bytes = 0
    for text, last in read_pieces(path):
        content = text.encode()
        digest.update(content)
        length += len(text)
        n_bytes += len(content)
        if last:
            yield digest.digest(), length, n_bytes
            digest = hashlib.sha256()
            length = 0
            n_bytes = 0


def read_pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """A file's text in pieces, and whether a document ends with each; UNREADABLE if not text."""
    opener = gzip.open if path.suffix == ".gz" else open
    uncompressed = path.with_suffix("") if path.suffix == ".gz" else path
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as stream:
        if uncompressed.suffix == ".jsonl":
            # A document from the `text` field of each line.
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise ValueError(f"line {number} has no text field with a string")
                document = without_lone_surrogates(record["text"])
                yield from read_text(io.StringIO(document, newline=""))
            return
        for text, last in read_text(stream):
            if "\0" in text:
                raise ValueError("it holds zero bytes")
            yield text, last


def read_text(stream: io.TextIOBase) -> Iterator[tuple[str, bool]]:
    """One document, cut at line ends where it has any."""
    text = stream.read(PIECE)
    while more := stream.read(PIECE):
        end = text.rfind("\n") + 1 or len(text)
        yield text[:end], False
        text = text[end:] + more
    if text:
        yield text, True
