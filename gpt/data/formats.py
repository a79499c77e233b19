"""Read documents from text, JSON lines, JSON arrays, parquet and arrow, plain or compressed.

A file's format is recognized by its content; its name is only a hint. Every reader yields chunks
`(text, ends)`: text in order, and whether a document ends with it. `read_pieces` turns them into
pieces of bounded size that do not depend on the format. Independent of tokens.
"""

import bz2
import codecs
import gzip
import importlib.util
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from gpt.data.options import Reading
from gpt.data.tokenizers import without_lone_surrogates
from gpt.errors import UserError, one_line, require

PIECE = 2**20  # maximum characters in a piece, and bytes of text per read
HEAD = 2**16  # bytes read to recognize a format
ROWS = 256  # rows of a table per read
MIN_SHARE = 0.9  # a file is text if at least this share of its first characters is valid UTF-8

READ_ERRORS = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError)

# Unsupported formats, by their first bytes.
UNREADABLE = {
    b"version https://git-lfs": "a Git LFS pointer, `git lfs pull` fetches the file itself",
    b"\xff\xfe": "UTF-16, convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16, convert it: iconv -f UTF-16 -t UTF-8",
    b"PK\x03\x04": "a zip archive, unpack it",
    (20240520).to_bytes(4, "little"): "a token shard, name it without any text",
    (20240801).to_bytes(4, "little"): "a token shard, name it without any text",
}
TABLE_NAMES = {".parquet", ".arrow", ".feather"}
RECORD = re.compile(rb'\[?\s*\{\s*"')  # how a JSON record begins, in an array or not


class NotText(Exception):
    """A file is not text but, say, an image; the message is the reason."""


@dataclass
class BadDocuments:
    """A file's unreadable documents: errors or, with `skip`, left out and counted."""

    path: Path
    skip: bool
    count: int = 0
    first: str = ""

    def add(self, where: str, reason: str) -> None:
        """Count a bad document; UserError without `skip`."""
        message = f"{self.path}, {where}: {reason}"
        require(self.skip, f"{message}; repair it, or leave it out with --skip-bad-documents")
        self.count += 1
        self.first = self.first or message


# ------------------------------------------------------------ what a file holds


def recognize(path: Path, reading: Reading) -> str:
    """The name of a file's format, and of its compression; "" for an empty file.

    Raises NotText for images and the like, and UserError for data that cannot be read.
    """
    try:
        with path.open("rb") as raw:
            stream, compression = decompressed(raw)
            head = stream.read(HEAD)
            name = recognize_content(path, head, stream, reading)
    except READ_ERRORS as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return f"{name}, {compression}" if name and compression else name


def recognize_content(path: Path, head: bytes, stream: BinaryIO, reading: Reading) -> str:
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if not head:
        return ""
    if head.startswith(b"PAR1"):
        require_pyarrow(path)
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) and head[4:8] != b"\xff\xff\xff\xff":
        require_pyarrow(path)
        return "arrow"
    unreadable = [what for beginning, what in UNREADABLE.items() if head.startswith(beginning)]
    if head[257:262] == b"ustar":
        unreadable.append("a tar archive, unpack it")
    if path.suffix in (".pkl", ".pickle"):
        unreadable.append("a pickle, which can run any program when it is opened")
    require(not unreadable, f"{path} cannot be read: it is {', '.join(unreadable)}")
    named_table = TABLE_NAMES & suffixes
    require(
        not named_table,
        f"{path} is damaged: it is named {min(named_table, default='')}, but holds something else",
    )

    if head.startswith(b"%PDF"):
        raise NotText("it is a PDF: extract its text first with pdftotext")
    if b"\0" in head:
        raise NotText("it holds zero bytes")
    text = head.decode("utf-8-sig", "replace")
    if text.count("\ufffd") > max((1 - MIN_SHARE) * len(text), 1):
        raise NotText(
            f"it is not valid UTF-8, convert it: iconv -f ITS-ENCODING -t UTF-8 {path}, where "
            "ITS-ENCODING is GB18030 or BIG5 for most Chinese text, CP1252 for most European text"
        )
    if text.lstrip()[:1] in ("{", "["):
        return recognize_json(path, head, stream, suffixes, reading.text_column)
    return "text"


def recognize_json(
    path: Path, head: bytes, stream: BinaryIO, suffixes: set[str], column: str
) -> str:
    """Whether a file is "JSON lines", "JSON", or "text" that only starts like JSON.

    Records have a field `column`. Two objects with the same fields, but not that one, are taken for
    records with their text in another field, and UserError lists their fields. EOFError if the file
    ends inside its first record.
    """
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    values = []
    try:
        for value in islice(json_values(stream, head, errors="replace"), 2):
            values.append(value)
    except EOFError:
        if RECORD.match(head) and not values:
            raise
    except (ValueError, RecursionError):
        pass  # plain text, or a damaged second record, which its reader will report
    first_line, ends, _ = head.partition(b"\n")
    is_line = head.startswith(b"{") and (not ends or first_line.rstrip().endswith(b"}"))
    name = "JSON lines" if is_line else "JSON"
    if head.startswith(b"[") and values and isinstance(values[0], str):
        return name if ".json" in suffixes else "text"

    records = [value for value in values if isinstance(value, dict)]
    is_named_so = bool(suffixes & {".jsonl", ".ndjson"})
    require(bool(records) or not is_named_so, f"{path} is damaged: line 1 is not a JSON object")
    if any(column in record for record in records):
        return name
    alike = len(records) == 2 and records[0].keys() == records[1].keys()
    require(
        not (alike or is_named_so),
        f"{path} holds records without a field {column!r}: choose the one that holds the text with "
        f"--text-column: {', '.join(map(repr, (records or [{}])[0]))}",
    )
    return "text"


def require_pyarrow(path: Path) -> None:
    require(
        importlib.util.find_spec("pyarrow") is not None,
        f"{path} needs pyarrow, which is not installed: pip install -e '.[data]'",
    )


def decompressed(raw: io.BufferedReader) -> tuple[BinaryIO, str]:
    """A stream that decompresses a file as it is read, and the compression's name, or ""."""
    head = raw.peek(8)
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), PIECE), "gzip"
    if head.startswith(b"BZh"):
        return io.BufferedReader(bz2.BZ2File(raw), PIECE), "bzip2"
    if head.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(lzma.LZMAFile(raw), PIECE), "xz"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        require_pyarrow(Path(raw.name))
        import pyarrow

        unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        return io.BufferedReader(unpacked, PIECE), "zstd"
    return raw, ""


# ------------------------------------------------------------ its documents


def read_pieces(
    path: Path,
    file_format: str,
    reading: Reading,
    bad: BadDocuments,
    report: Callable[[int], None] = lambda n_bytes: None,
) -> Iterator[tuple[str, bool]]:
    """A file's documents in pieces: text, and whether a document ends with it.

    file_format: from `recognize`. report: called with the bytes of the file read since the last
    call. A document of up to PIECE characters is one piece; the last piece of a longer one may be
    empty. Raises UserError if the file is damaged.
    """
    last = True
    reported = 0
    with path.open("rb") as raw:
        try:
            stream, _ = decompressed(raw)
            chunks = READERS[file_format.split(",")[0]](stream, reading.text_column, bad)
            for text, last in cut_documents(chunks, reading.end_of_document):
                yield text, last
                if raw.tell() > reported:
                    report(raw.tell() - reported)
                    reported = raw.tell()
        except READ_ERRORS as error:
            bad.add(f"near byte {raw.tell():,}", f"it is damaged or cut off ({one_line(error)})")
            if not last:
                yield "", True
        size = path.stat().st_size
        if size > reported:
            report(size - reported)


def cut_documents(chunks: Iterable[tuple[str, bool]], separator: str) -> Iterator[tuple[str, bool]]:
    """Turn a reader's chunks into pieces.

    A document also ends at each `separator`, which is dropped. Long documents are cut at line ends,
    at positions that depend only on the document.
    """
    lookahead = len(separator) + 4
    text = ""  # the part of the current document not yet yielded
    begun = False  # whether part of it has been yielded
    for chunk, ends in chunks:
        text += chunk
        documents = [text]
        if separator and separator in text:
            documents = split_documents(text, separator)
        if ends:
            documents.append("")
        for number, text in enumerate(documents, 1):
            is_whole = number < len(documents)
            longest = PIECE if is_whole else PIECE + lookahead
            while len(text) > longest:
                cut = text.rfind("\n", 0, PIECE) + 1 or PIECE
                yield text[:cut], False
                text = text[cut:]
                begun = True
            if is_whole:
                if text or begun:
                    yield text, True
                begun = False


def split_documents(text: str, separator: str) -> list[str]:
    """The text between separators; a separator alone on its line is dropped with its line ends."""
    parts = text.split(separator)
    for i in range(len(parts) - 1):
        before, after = parts[i], parts[i + 1]
        if (before == "" or before.endswith("\n")) and after.startswith(("\n", "\r\n")):
            parts[i] = before.removesuffix("\n").removesuffix("\r")
            parts[i + 1] = after.removeprefix("\r").removeprefix("\n")
    return parts


def read_text(stream: BinaryIO, column: str, bad: BadDocuments) -> Iterator[tuple[str, bool]]:
    """A text file as one document."""
    position = 0
    while block := stream.read(PIECE) + stream.readline(PIECE):
        while b"\x80" <= stream.peek(1)[:1] < b"\xc0":  # the block ends inside a character
            block += stream.read(1)
        text = decode(block, position, bad)
        yield text.removeprefix("\ufeff") if position == 0 else text, False
        position += len(block)
    yield "", True


def decode(block: bytes, position: int, bad: BadDocuments) -> str:
    """The text of a block at `position` in its file, without its bad lines."""
    try:
        if b"\0" not in block:
            return block.decode()
    except UnicodeDecodeError:
        pass
    kept = []
    for line in block.splitlines(keepends=True):
        try:
            text = line.decode()
            if "\0" in text:
                bad.add(f"byte {position + line.index(0):,}", "it is 0x00, text has no zero bytes")
            else:
                kept.append(text)
        except UnicodeDecodeError as error:
            byte = f"byte {position + error.start:,}"
            bad.add(byte, f"{line[error.start]:#04x} is not valid UTF-8 ({error.reason})")
        position += len(line)
    return "".join(kept)


def read_json_lines(stream: BinaryIO, column: str, bad: BadDocuments) -> Iterator[tuple[str, bool]]:
    """A document from the field `column` of the object on each line."""
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            yield from record_text(json.loads(line), column)
        except (ValueError, RecursionError) as error:
            bad.add(f"line {number:,}", one_line(error))


def read_json(stream: BinaryIO, column: str, bad: BadDocuments) -> Iterator[tuple[str, bool]]:
    """A document from each object or string in a JSON array or in consecutive JSON values."""
    for number, value in enumerate(json_values(stream), 1):
        try:
            yield from record_text(value, column)
        except ValueError as error:
            bad.add(f"record {number:,}", one_line(error))


def record_text(record: Any, column: str) -> Iterator[tuple[str, bool]]:
    """The document of a JSON record, none if its text is null; ValueError if it has no text."""
    if isinstance(record, dict) and column in record:
        record = record[column]
        if record is None:
            return
    if not isinstance(record, str):
        raise ValueError(f"it has no string in its text field ({column!r})")
    yield without_lone_surrogates(record), True


def json_values(stream: BinaryIO, beginning: bytes = b"", errors: str = "strict") -> Iterator[Any]:
    """The values of a JSON array, or consecutive JSON values, as the stream is read.

    beginning: bytes already read from the stream. errors: for invalid UTF-8, as in `bytes.decode`.
    Raises EOFError if the last value is cut off, and ValueError for invalid JSON.
    """
    decode_some = codecs.getincrementaldecoder("utf-8-sig")(errors).decode
    parse = json.JSONDecoder().raw_decode
    text = decode_some(beginning or stream.read(HEAD)).lstrip()
    is_array = text.startswith("[")
    text = text.removeprefix("[").lstrip()
    wanted = HEAD
    while True:
        try:
            value, end = parse(text)
        except json.JSONDecodeError as error:
            # A value that continues beyond `text` fails at its end or inside an open string.
            may_continue = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
            if not may_continue:
                raise
            block = stream.read(wanted)
            if not block and text.strip() == ("]" if is_array else ""):
                return
            if not block:
                raise EOFError("the file ends inside a JSON record") from None
            text = (text + decode_some(block)).lstrip()
            wanted *= 2
            continue
        yield value
        text = text[end:].lstrip()
        if is_array:
            text = text.removeprefix(",").lstrip()
        wanted = HEAD


def read_parquet(stream: BinaryIO, column: str, bad: BadDocuments) -> Iterator[tuple[str, bool]]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream, buffer_size=PIECE, pre_buffer=False)
    require_column(file.schema_arrow, column, bad.path)
    batches = file.iter_batches(ROWS, columns=[column], use_threads=False)
    return rows_of(batch.column(0) for batch in batches)


def read_arrow(stream: BinaryIO, column: str, bad: BadDocuments) -> Iterator[tuple[str, bool]]:
    import pyarrow

    if stream.peek(6).startswith(b"ARROW1"):
        file = pyarrow.ipc.open_file(stream)
        batches = (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        file = pyarrow.ipc.open_stream(stream)
        batches = file
    require_column(file.schema, column, bad.path)
    return rows_of(batch.column(column) for batch in batches)


def require_column(schema: Any, column: str, path: Path) -> None:
    """Raise UserError unless a pyarrow table has a `column` of text."""
    texts = [field.name for field in schema if "string" in str(field.type)]
    require(
        column in texts,
        f"{path} has no column {column!r} of text: choose one with --text-column: "
        f"{', '.join(map(repr, texts)) or 'it has none'}",
    )


def rows_of(columns: Iterable[Any]) -> Iterator[tuple[str, bool]]:
    """A document from each row; ValueError if a column is damaged."""
    for column in columns:
        column.validate(full=True)  # arrow has no checksums and would trust damaged offsets
        for start in range(0, len(column), ROWS):
            for text in column.slice(start, ROWS).to_pylist():
                if text is not None:
                    yield text, True


READERS = {
    "text": read_text,
    "JSON lines": read_json_lines,
    "JSON": read_json,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
