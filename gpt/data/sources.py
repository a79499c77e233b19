"""The files that text is read from: found in folders and by patterns, told apart by content."""

import glob
import hashlib
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gpt.data import formats
from gpt.data.formats import BadDocuments, NotText
from gpt.data.options import Reading
from gpt.errors import UserError, require

EXPECTED = (
    "expected text, JSON lines or arrays, parquet or arrow files, plain or compressed, or token "
    "shards; or a folder or a pattern of such files"
)
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NOT_LIBRARY |= {"encodings", "pydoc_data"}  # tables and manuals: a sixth of it, and not code
SPLIT_NAME = re.compile(
    r"(?:.*[-_.])?(train|test|validation|valid|val)(?:[-_.]\d+.*)?\.(?:parquet|jsonl?|arrow)(?:\.\w+)?"
)
# What stands beside data files and is not data itself.
ABOUT = re.compile(r"(readme|license|dataset_infos?|dataset_dict|state)\b.*", re.IGNORECASE)
THREADS = min(os.cpu_count() or 1, 16)


@dataclass(frozen=True)
class SourceFile:
    """A file and its name inside the folder or the list that the user named, wherever that is."""

    path: Path
    name: str
    size: int
    modified_ns: int

    @property
    def stat(self) -> list:
        """What tells, without reading it, whether it is the same file."""
        return [self.name, self.size, self.modified_ns]

    def has_changed(self) -> bool:
        """Whether the file has another size or time by now."""
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns)


@dataclass(frozen=True, eq=False)
class Source:
    """Files to read text from, in order, before they are opened. `named`: those not in a folder."""

    title: str
    files: list[SourceFile]
    named: set[Path] = field(default_factory=set)
    is_library: bool = False

    @property
    def size(self) -> int:
        """Bytes of the files as they are on disk."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, eq=False)
class Text:
    """The files of a source that hold text, the format of each, and why others are left out."""

    files: list[SourceFile]
    forms: list[str]
    notes: list[str]

    @property
    def description(self) -> str:
        """How many files of which formats, and how large."""
        counts = Counter(self.forms)
        kinds = ", ".join(f"{count:,} {form}" for form, count in counts.most_common())
        size = sum(file.size for file in self.files)
        many = "1 file" if len(self.files) == 1 else f"{len(self.files):,} files"
        return f"{many} ({kinds}), {size / 1e6:,.1f} MB"

    def texts(self, reading: Reading) -> Iterator[str]:
        """The text in order, in pieces of about a megabyte at most."""
        for text, _ in self.pieces(reading):
            yield text

    def pieces(self, reading: Reading) -> Iterator[tuple[str, bool]]:
        """The text in order, as `formats.read_pieces` gives it."""
        for file, form in zip(self.files, self.forms, strict=True):
            bad = BadDocuments(file.path, reading.skip_bad_documents)
            yield from formats.read_pieces(file.path, form, reading, bad)


def find(paths: Sequence[Path]) -> Source:
    """All files of the paths: files, folders, and patterns such as data/*.parquet.

    Hidden files in folders and what training runs have written there are passed over. Raises
    UserError for a path that is not there, and for a folder of several splits.
    """
    files = []
    named = set()
    for path in expand(paths):
        if path.is_dir():
            inside = find_in_folder(path)
            require(bool(inside), f"{path} holds no text: {EXPECTED}")
            files += inside
        else:
            files.append(describe_file(path, path.name))
            named.add(path)
    return Source(", ".join(map(str, paths)), files, named)


def expand(paths: Sequence[Path]) -> list[Path]:
    """The paths, with what they match in place of patterns; UserError for one that is not there."""
    found = []
    for path in paths:
        matches = [path]
        if not path.exists() and glob.has_magic(str(path)):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        require(bool(matches) and matches[0].exists(), f"{path} does not exist: {EXPECTED}")
        found += matches
    return found


def find_in_folder(origin: Path) -> list[SourceFile]:
    """The visible files below a folder, sorted by name; linked folders are followed once."""
    found = []
    visited = set()
    for folder, inside, files in os.walk(origin, followlinks=True):
        visited.add(os.path.realpath(folder))
        require(
            "dataset_dict.json" not in files,
            f"{folder} holds several splits of a dataset: name one, as in --data {folder}/train "
            f"--val-data {folder}/test",
        )
        if {"checkpoints", "tokenizer.json"} <= {*inside, *files}:
            inside.clear()  # a run's folder changes as it trains
            continue
        fresh = []
        for name in sorted(inside):
            real = os.path.realpath(Path(folder, name))
            if not name.startswith(".") and real not in visited:
                visited.add(real)
                fresh.append(name)
        inside[:] = fresh
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    found = [path for path in found if path.is_file()]  # reading a pipe would never end
    names = sorted(path.relative_to(origin).as_posix() for path in found)
    splits = {match[1] for name in names if (match := SPLIT_NAME.fullmatch(Path(name).name))}
    require(
        len(splits) < 2,
        f"{origin} holds several splits of a dataset ({', '.join(sorted(splits))}): name one, as "
        f"in --data '{origin}/**/train-*' --val-data '{origin}/**/test-*'",
    )
    return [describe_file(origin / name, name) for name in names]


def describe_file(path: Path, name: str) -> SourceFile:
    status = path.stat()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def standard_library() -> Source:
    """The code of the running Python's own standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in NOT_LIBRARY]
        below = Path(folder).relative_to(root)
        names += [(below / name).as_posix() for name in files if name.endswith(".py")]
    title = f"the source text of Python {platform.python_version()}'s standard library"
    files = [describe_file(root / name, name) for name in sorted(names)]
    return Source(title, files, is_library=True)


def open_text(source: Source, reading: Reading) -> Text:
    """The files of a source that hold text, by the first bytes of each.

    Pictures and the like are left out and noted. Raises UserError for a named file that is not
    text, for data that cannot be read (unless bad documents are skipped), and where more would be
    left out than read.
    """

    def recognize(file: SourceFile) -> str | Exception:
        try:
            return formats.recognize(file.path, reading)
        except (NotText, UserError) as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(recognize, source.files))

    used = []
    skipped = []
    for file, form in zip(source.files, found, strict=True):
        if isinstance(form, UserError) and not reading.skip_bad_documents:
            raise form
        if isinstance(form, Exception):
            reason = f"{file.path} cannot be read as text ({form}): {EXPECTED}"
            require(file.path not in source.named, reason)
            skipped.append((file, str(form)))
        elif form:
            used.append((file, form))

    # A README beside data files describes them; it is not part of the data.
    notes = []
    if any(form != "text" and "." in Path(file.name).name for file, form in used):
        about = [file for file, _ in used if ABOUT.fullmatch(Path(file.name).name)]
        about = [file for file in about if file.path not in source.named]
        used = [(file, form) for file, form in used if file not in about]
        notes += [f"not used       {file.name}: it is about the data" for file in about]

    if skipped:
        count = len(skipped)
        many = "1 file that is" if count == 1 else f"{count:,} files that are"
        listed = ", ".join(f"{file.name} ({reason})" for file, reason in skipped[:5])
        more = ", ..." if count > 5 else ""
        notes.append(f"skipped        {many} not text: {listed}{more}")
        n_skipped = sum(file.size for file, _ in skipped)
        n_used = sum(file.size for file, _ in used)
        require(
            n_skipped <= n_used or reading.skip_bad_documents or not used,
            f"{source.title}: most of it is not text, {n_skipped:,} bytes beside {n_used:,} of "
            f"text: {listed}{more}; name the files to read, or add --skip-bad-documents",
        )
    require(bool(used), f"{source.title} holds no text: {EXPECTED}")
    return Text([file for file, _ in used], [form for _, form in used], notes)


def hash_files(files: Iterable[SourceFile]) -> list[str]:
    """The SHA-256 in hex of each file as it is on disk."""

    def hash_file(file: SourceFile) -> str:
        try:
            with file.path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{file.path} cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(hash_file, files))
