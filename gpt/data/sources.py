"""Find text files in folders and by patterns, and recognize their formats by content."""

import dataclasses
import functools
import glob
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich import filesize

from gpt.data import formats
from gpt.data.formats import BadDocuments, NotText
from gpt.data.options import Reading
from gpt.errors import UserError, require
from gpt.wording import counted

EXPECTED = (
    "expected text, JSON lines or arrays, parquet or arrow files, plain or compressed, or token "
    "shards; or a folder or a pattern of such files"
)
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NOT_LIBRARY |= {"encodings", "pydoc_data"}  # tables and manuals
SPLIT_NAME = re.compile(
    r"(?:.*[-_.])?(train|test|validation|valid|val)(?:[-_.]\d+.*)?\.(?:parquet|jsonl?|arrow)(?:\.\w+)?"
)
# Files that describe the data next to them.
ABOUT = re.compile(r"(readme|license|dataset_infos?|dataset_dict|state)\b.*", re.IGNORECASE)
THREADS = min(os.cpu_count() or 1, 16)


@dataclass(frozen=True)
class SourceFile:
    """A file to read. `name`: its path inside the folder the user named.

    file_format: from `formats.recognize`, once the file has been opened.
    """

    path: Path
    name: str
    size: int
    modified_ns: int
    file_format: str = ""

    @property
    def stat(self) -> list:
        """A key that changes when the file does, known without reading it."""
        return [self.name, self.size, self.modified_ns]


@dataclass(frozen=True, eq=False)
class Source:
    """Files to read text from, in order.

    named: files the user named one by one. notes: on files that `open_text` left out.
    """

    title: str
    files: list[SourceFile]
    named: set[Path] = field(default_factory=set)
    is_library: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def description(self) -> str:
        """The number of files of each format, and their size."""
        counts = Counter(file.file_format for file in self.files)
        kinds = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
        return f"{counted(len(self.files), 'file')} ({kinds}), {filesize.decimal(self.size)}"

    def pieces(self, reading: Reading) -> Iterator[tuple[str, bool]]:
        """The text in order, as pieces from `formats.read_pieces`."""
        for file in self.files:
            bad = BadDocuments(file.path, reading.skip_bad_documents)
            yield from formats.read_pieces(file.path, file.file_format, reading, bad)


def find(paths: Sequence[Path]) -> Source:
    """All files at `paths`, which may be files, folders, or patterns such as data/*.parquet.

    Hidden files and run folders are skipped. Raises UserError for a path that does not exist, and
    for a folder with several splits.
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
    """The paths, with each pattern replaced by its matches; UserError if one does not exist."""
    found = []
    for path in paths:
        matches = [path]
        if not path.exists() and glob.has_magic(str(path)):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        require(bool(matches) and matches[0].exists(), f"{path} does not exist: {EXPECTED}")
        found += matches
    return found


def find_in_folder(origin: Path) -> list[SourceFile]:
    """The files below a folder, sorted by name, without hidden ones; each folder is read once."""
    found = []
    visited = set()
    for folder, inside, files in os.walk(origin, followlinks=True):
        real = os.path.realpath(folder)
        is_run = {"checkpoints", "tokenizer.json"} <= {*inside, *files}  # it changes in training
        if real in visited or is_run:
            inside.clear()
            continue
        visited.add(real)
        require(
            "dataset_dict.json" not in files,
            f"{folder} holds several splits of a dataset: name one, as in --data {folder}/train "
            f"--val-data {folder}/test",
        )
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    found = [path for path in found if path.is_file()]  # no pipes, which might never end
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
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted(path.as_posix() for path in paths if not NOT_LIBRARY & set(path.parts))
    title = f"the source text of Python {platform.python_version()}'s standard library"
    return Source(title, [describe_file(root / name, name) for name in names], is_library=True)


@functools.cache  # called for the tokenizer and again for the tokens
def open_text(source: Source, reading: Reading) -> Source:
    """The source with only the files that hold text, recognized by their first bytes.

    Images and the like are left out and noted. Raises UserError for a named file that is not
    text, for data that cannot be read (unless bad documents are skipped), and if more bytes would
    be left out than read.
    """

    def recognize(file: SourceFile) -> str | Exception:
        try:
            return formats.recognize(file.path, reading)
        except (NotText, UserError) as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        recognized = list(pool.map(recognize, source.files))

    used = []
    skipped = []
    for file, found in zip(source.files, recognized, strict=True):
        if isinstance(found, UserError) and not reading.skip_bad_documents:
            raise found
        if isinstance(found, Exception):
            reason = f"{file.path} cannot be read as text ({found}): {EXPECTED}"
            require(file.path not in source.named, reason)
            skipped.append((file, found))
        elif found:
            used.append(dataclasses.replace(file, file_format=found))

    # A README beside data files describes them; it is not part of the data.
    notes = []
    if any(file.file_format != "text" and file.path.suffix for file in used):
        about = [file for file in used if ABOUT.fullmatch(file.path.name)]
        about = [file for file in about if file.path not in source.named]
        used = [file for file in used if file not in about]
        notes += [f"not used       {file.name}: it describes the data" for file in about]

    if skipped:
        listed = ", ".join(f"{file.name} ({reason})" for file, reason in skipped[:5])
        listed += ", ..." if len(skipped) > 5 else ""
        notes.append(f"skipped        {counted(len(skipped), 'file')}, not text: {listed}")
        n_skipped = sum(file.size for file, _ in skipped)
        n_used = sum(file.size for file in used)
        require(
            n_skipped <= n_used or reading.skip_bad_documents or not used,
            f"{source.title}: most of it is not text, {n_skipped:,} bytes against {n_used:,} of "
            f"text: {listed}; name the files to read, or add --skip-bad-documents",
        )
    require(bool(used), f"{source.title} holds no text: {EXPECTED}")
    return dataclasses.replace(source, files=used, notes=notes)
