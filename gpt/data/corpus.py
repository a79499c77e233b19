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
from dataclasses import dataclass, field
from pathlib import Path

from gpt.data.tokenizers import without_lone_surrogates
from gpt.errors import require

PIECE = 2**20  # characters read at once; no piece of a text is twice as long
UNREADABLE = (ValueError, OSError, EOFError, RecursionError, zlib.error)
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
EXPECTED = "expected UTF-8 text, .jsonl with a text field on each line, or .gz of either"


@dataclass(frozen=True)
class Source:
    """One file of text.

    name: its path from the folder the user named, that folder's name first: it decides the
        fingerprint, so it is the same wherever the folder lies.
    origin: the path the user named.
    """

    path: Path
    name: str
    origin: Path


@dataclass
class Measure:
    """What one reading of some text yields: see the fields of Corpus."""

    hashes: array = field(default_factory=lambda: array("Q"))
    lengths: array = field(default_factory=lambda: array("Q"))
    n_bytes: int = 0

    def add(self, other: "Measure") -> None:
        """Append the documents of `other`."""
        self.hashes.extend(other.hashes)
        self.lengths.extend(other.lengths)
        self.n_bytes += other.n_bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents in a fixed order.

    skipped: names of the files in folders that are not text.
    fingerprint: SHA-256 in hex of names and contents.
    hashes: 64 bits of each document's SHA-256.
    lengths: characters in each document.
    size_bytes: bytes of the text in UTF-8.
    """

    description: str
    sources: tuple[Source, ...] = field(repr=False)
    skipped: tuple[str, ...]
    fingerprint: str
    hashes: array = field(repr=False)
    lengths: array = field(repr=False)
    size_bytes: int

    @property
    def n_documents(self) -> int:
        """Documents with any text in them."""
        return len(self.hashes)

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text in order, about a megabyte at a time, and whether a document ends with it."""
        for source in self.sources:
            yield from read_pieces(source.path)

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
    require(bool(origins), "no text was named: pass a text file or a folder of text")
    sources = [source for origin in origins for source in find(origin)]
    corpus = measure(sources, ", ".join(str(path) for path in origins))
    for origin in origins:
        used = any(source.origin == origin for source in corpus.sources)
        require(used, f"{origin} holds no text: {EXPECTED}")
    return corpus


def standard_library() -> Corpus:
    """The source of the running Python's own standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not NOT_LIBRARY & set(Path(name).parts)]
    title = f"the source text of Python {platform.python_version()}'s standard library"
    corpus = measure([Source(root / name, name, root) for name in names], title)
    require(corpus.n_documents > 0, f"{title} is not at {root}: pass your own text with --data")
    return corpus


def find(origin: Path) -> list[Source]:
    """The file `origin`, or the visible files below the folder `origin`, sorted by name.

    What training runs have written there is left out.
    """
    require(
        os.path.exists(origin), f"{origin} does not exist: {EXPECTED}, or a folder of such files"
    )
    if not origin.is_dir():
        return [Source(origin, origin.name, origin)]
    found = []
    for folder, inside, files in os.walk(origin):
        if {"checkpoints", "tokenizer.json"} <= {*inside, *files}:
            inside.clear()  # a run's folder changes as it trains
            continue
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    found = [path for path in found if path.is_file()]  # reading a pipe would never end
    names = sorted(path.relative_to(origin).as_posix() for path in found)
    return [Source(origin / name, f"{origin.resolve().name}/{name}", origin) for name in names]


def measure(sources: list[Source], title: str) -> Corpus:
    """The corpus of those `sources` that hold text; UserError for a named file that does not."""
    used = []
    skipped = []
    total = Measure()
    fingerprint = hashlib.sha256()
    for source in sources:
        try:
            scanned, digest = scan(source.path)
        except UNREADABLE as error:
            reason = str(error)
            if isinstance(error, UnicodeDecodeError):
                reason = f"bytes that are not valid UTF-8, {error.object[error.start]:#04x} first"
            named = source.path == source.origin
            require(not named, f"{source.path} cannot be read as text ({reason}): {EXPECTED}")
            skipped.append(source.name)
            continue
        if scanned.hashes:
            used.append(source)
            total.add(scanned)
            line = f"{len(source.name)} {source.name} {digest}\n"
            fingerprint.update(line.encode("utf-8", "replace"))
    files = "1 file" if len(used) == 1 else f"{len(used):,} files"
    return Corpus(
        description=f"{title}: {files}, {total.n_bytes / 1e6:.1f} MB",
        sources=tuple(used),
        skipped=tuple(skipped),
        fingerprint=fingerprint.hexdigest(),
        hashes=total.hashes,
        lengths=total.lengths,
        size_bytes=total.n_bytes,
    )


def scan(path: Path) -> tuple[Measure, str]:
    """The measure of one file's documents and a digest of them all; UNREADABLE if not text."""
    found = Measure()
    everything = hashlib.sha256()
    document = hashlib.sha256()
    length = 0
    for text, last in read_pieces(path):
        content = text.encode()
        document.update(content)
        length += len(text)
        found.n_bytes += len(content)
        if last:
            digest = document.digest()
            found.hashes.append(int.from_bytes(digest[:8], "little"))
            found.lengths.append(length)
            everything.update(digest)
            document = hashlib.sha256()
            length = 0
    return found, everything.hexdigest()


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
