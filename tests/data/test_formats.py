"""A file's format is told by its content; the same documents come out of every format."""

import gzip
import itertools
import json

import pytest
from data_files import COMPRESSORS, DOCS, PLAIN, WRITERS, json_lines, tokenize, write

from gpt.data import formats
from gpt.data.formats import BadDocuments, NotText, read_pieces, recognize
from gpt.data.options import Reading
from gpt.errors import UserError


def read(path, reading=PLAIN, bad=None):
    """The documents of a file, their pieces put together again."""
    texts, current = [], ""
    bad = bad or BadDocuments(path, reading.skip_bad_documents)
    for text, last in read_pieces(path, recognize(path, reading), reading, bad):
        current += text
        if last:
            texts.append(current)
            current = ""
    assert current == ""
    return texts


@pytest.mark.parametrize("compression", list(COMPRESSORS)[1:])
@pytest.mark.parametrize("form", ["text", "JSON lines", "JSON"])
def test_text_may_be_compressed(form, compression, tmp_path):
    path = write(tmp_path / "data.txt", form, compression)
    assert recognize(path, PLAIN) == f"{form}, {compression}"
    assert read(path) == DOCS


def test_every_format_gives_the_same_tokens(tmp_path):
    """To the byte: many documents, of which some are held out."""
    docs = [f"{i} {doc}" for i in range(20) for doc in DOCS]
    found = set()
    for form in WRITERS:
        folder = tokenize(write(tmp_path / "data", form, docs=docs), tmp_path / form, 0.3)
        found.add(tuple(file.read_bytes() for file in sorted(folder.glob("*.bin"))))
    (shards,) = found
    assert len(shards) == 2


@pytest.mark.parametrize("form", [*WRITERS, "gzip", "zstd", "bzip2", "xz"])
def test_what_is_cut_off_or_changed_is_refused_in_one_line(form, tmp_path):
    """Cut at five places: never are the documents before it taken for all of them."""
    compression = form if form in COMPRESSORS else ""
    docs = [f"{i} {doc}" for i in range(40) for doc in DOCS]
    path = write(tmp_path / "data.jsonl", "JSON lines" if compression else form, compression, docs)
    whole = path.read_bytes()
    for kept in (0.21, 0.53, 0.8, 0.95, 0.999):
        path.write_bytes(whole[: int(len(whole) * kept)])
        if form == "text":
            path.write_bytes(path.read_bytes() + b"\xff\n" + whole)
        with pytest.raises(
            UserError, match=r"data.jsonl.* (damaged|valid|Expecting|Unterm|cannot)"
        ):
            read(path)


@pytest.mark.parametrize("name", ["data", "data.json.gz"])
def test_json_cut_off_inside_its_first_record_is_not_text(name, tmp_path):
    """Nor is a long first record that was saved with line ends."""
    whole = json.dumps([{"url": "x", "text": "word " * 50_000}], indent=1).encode()
    compress = gzip.compress if name.endswith(".gz") else bytes
    path = tmp_path / name
    for kept in (20, 1000, len(whole) - 10):
        path.write_bytes(compress(whole[:kept]))
        with pytest.raises(UserError, match="ends inside a JSON record"):
            recognize(path, PLAIN)
    path.write_bytes(compress(whole))
    assert read(path) == ["word " * 50_000]


NO_TEXT = {
    "photo.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "zero bytes"),
    "latin.txt": (b"caf\xe9", "byte 3: 0xe9 is not valid UTF-8"),
    "gbk.txt": ("今天天气很好，我们去河边钓鱼。\n".encode("gb18030") * 50, "iconv -f .* GB18030"),
    "wide.txt": ("text".encode("utf-16"), "UTF-16"),
    "paper.pdf": (b"%PDF-1.4\n" + b"stream " * 50, "pdftotext"),
    "archive.zip": (b"PK\x03\x04\x14\0", "zip archive"),
    "a.parquet": (b"PAR2 is not it", "is named .parquet"),
    "b.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "meta.pkl": (b"\x80\x04\x95", "a pickle"),
    "cut.gz": (gzip.compress(b"text" * 100, mtime=0)[:-9], "cannot be read"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_refused_with_advice(name, tmp_path):
    content, advice = NO_TEXT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((NotText, UserError), match=advice):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (b'{\n "name": "package",\n "version": 1\n}\n', "text"),
        (b"{% block %}\nwords\n{% endblock %}\n", "text"),
        (b"[link](to/a/page) and words\n", "text"),
        (b'["a", "list"]\nof code\n', "text"),
        (b'{"text": "one"}', "JSON lines"),
        (b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}', "JSON lines"),
        (b'{\n "text": "one"\n}\n{\n "text": "two"\n}', "JSON"),
        (b'[\n{"text": "one"},\n{"text": "two"}]', "JSON"),
    ],
)
def test_what_begins_like_json(content, form, tmp_path):
    (tmp_path / "data").write_bytes(content)
    assert recognize(tmp_path / "data", PLAIN) == form
    read(tmp_path / "data")


def test_records_without_the_column_are_refused_with_the_columns_that_there_are(tmp_path):
    lines = b'{"content": "a", "id": 1}\n{"content": "b", "id": 2}\n'
    for name, content in (("a", lines), ("b.json", b"[" + lines.replace(b"\n", b",")[:-1] + b"]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"--text-column: 'content', 'id'"):
            recognize(tmp_path / name, PLAIN)
        assert read(tmp_path / name, Reading(text_column="content")) == ["a", "b"]
    path = write(tmp_path / "c", "parquet")
    with pytest.raises(UserError, match=r"no column 'content' of text.*: 'text'"):
        read(path, Reading(text_column="content"))


def test_separators_end_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\n\ntwo lines\n<|endoftext|>\nthree<|endoftext|>four\n<|endoftext|>\n")
    assert read(path) == ["one\n\ntwo lines", "three", "four"]
    assert read(path, Reading(separator="none")) == [path.read_text()]
    blank = read(path, Reading(separator="\\n\\n"))
    assert blank[0] == "one" and len(blank) == 2
    path.write_bytes(b"one\r\n<|endoftext|>\r\ntwo\r\n")
    assert read(path) == ["one", "two\r\n"]
    path.write_bytes(json_lines(["one<|endoftext|>two", "three"]))
    assert read(path) == ["one", "two", "three"]


@pytest.mark.parametrize("piece", [7, 8, 11])
def test_a_separator_may_stand_anywhere_in_the_file(piece, tmp_path, monkeypatch):
    """At the end of what is read at once, or across it."""
    monkeypatch.setattr(formats, "PIECE", piece)
    path = tmp_path / "stories.txt"
    path.write_text("eins é<|endoftext|>zwei\n<|endoftext|>\ndrei 今天<|endoftext|>vier")
    assert read(path) == ["eins é", "zwei", "drei 今天", "vier"]


@pytest.mark.parametrize("form", ["text", "JSON lines"])
def test_long_documents_come_in_the_same_pieces_wherever_they_stand(form, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 100)
    docs = ["line é\n" * 100, "x" * 1000, "\n" + "y" * 450, "z" * 100, "a\n" * 50, "b" * 101]
    expected = [list(formats.cut_documents([(doc, True)], "")) for doc in docs]
    path = write(tmp_path / "data", form, docs=["first", *docs])
    bad = BadDocuments(path, False)
    pieces = [p for p in read_pieces(path, recognize(path, PLAIN), PLAIN, bad) if p[0] or p[1]]
    assert pieces == [("first", True), *itertools.chain(*expected)]
    assert all(len(text) <= 100 for text, _ in pieces)
    assert all(text.endswith("\n") for text, last in pieces if "line" in text and not last)


def test_a_bad_byte_is_named_by_its_place_or_its_line_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 1000)
    lines = [f"line {i} é\n".encode() for i in range(2000)]
    lines[1500] = b"caf\xe9 here\n"
    path = tmp_path / "large.txt"
    path.write_bytes(b"".join(lines))
    place = sum(map(len, lines[:1500])) + 3
    with pytest.raises(UserError, match=rf"byte {place:,}: 0xe9 is not valid UTF-8"):
        read(path)
    bad = BadDocuments(path, True)
    (text,) = read(path, bad=bad)
    assert bad.count == 1 and "line 1499 é\nline 1501 é\n" in text
    path.write_bytes(b"\xef\xbb\xbfone\n")
    assert read(path) == ["one\n"]
    path.write_bytes(b"\xef\xbb\xbfcaf\xe9 here\n")
    with pytest.raises(UserError, match="byte 6: 0xe9"):
        read(path)
    path.write_bytes(gzip.compress(b"a" * 1999 + "é".encode() + b"b" * 999 + "今".encode()[:2]))
    with pytest.raises(UserError, match="byte 3,000: 0xe4 is not valid UTF-8"):
        read(path)
    path.write_bytes(b"a\n" * 40_000 + b"b\0\n")
    with pytest.raises(UserError, match=r"byte 80,001: it is 0x00, text has no zero bytes"):
        read(path)
    path.write_bytes(b"ab\n" * 1000 + json_lines(DOCS) + b'{"text": 3}\n')
    assert len(read(path)) == 1


def test_bad_records_are_named_by_their_line_or_left_out(tmp_path):
    path = tmp_path / "data"
    good = json_lines(DOCS)
    for bad_line in (
        b"[1]\n",
        b'{"text": 3}\n',
        b'{"url": "y"}\n',
        b'{"text": "\xe9"}\n',
        b"[" * 9999,
    ):
        path.write_bytes(good + bad_line + b"\n" + good)
        with pytest.raises(UserError, match=r"data, line 6: .*--skip-bad-documents"):
            read(path)
        bad = BadDocuments(path, True)
        assert read(path, bad=bad) == DOCS * 2 and bad.count == 1 and "line 6" in bad.first
    path.write_bytes(good + b'{"text": null}\n{"text": "\\ud800"}\n')
    assert read(path) == [*DOCS, "\ufffd"]
