"""Text found, read and measured."""

import gzip
import json
import os

import pytest

from gpt.data import corpus as corpora
from gpt.data.corpus import read_corpus, standard_library
from gpt.errors import UserError


def joined(corpus) -> list[str]:
    """The corpus's documents, pieces put together again."""
    texts, current = [], ""
    for text, last in corpus.pieces():
        current += text
        if last:
            texts.append(current)
            current = ""
    assert current == ""
    return texts


def test_folders_are_read_in_order_without_hidden_and_binary_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "c.txt").write_text("three é", encoding="utf-8")
    (tmp_path / "a.py").write_text("one")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git" / "x").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "zeros.bin").write_bytes(b"a\0b")
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b not gzip")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    corpus = read_corpus([tmp_path])
    assert joined(corpus) == ["one", "two", "three é"]
    assert list(corpus.documents()) == ["one", "two", "three é"]
    assert (corpus.n_documents, corpus.size_bytes) == (3, 3 + 3 + 8)
    skipped = {"bad.jsonl", "broken.gz", "latin.txt", "zeros.bin"}
    assert set(corpus.skipped) == {f"{tmp_path.name}/{name}" for name in skipped}
    assert "3 files" in corpus.description and str(tmp_path) in corpus.description


def test_jsonl_and_gzip(tmp_path):
    lines = [{"text": "eins"}, {"text": "zwei\nzeilen", "id": 2}, {"text": ""}, {"text": "\ud800"}]
    content = "\n".join(map(json.dumps, lines)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"plain\r\ntext"))
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    three = ["eins", "zwei\nzeilen", "\ufffd"]
    assert joined(read_corpus([tmp_path])) == [*three, *three, "plain\r\ntext", "with a mark"]


def test_long_documents_come_in_pieces_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 100)
    texts = ["line é\n" * 100, "x" * 1000, "\n" + "y" * 450, "z" * 100, "a\n" * 50]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "9.jsonl").write_text(json.dumps({"text": texts[0]}))
    corpus = read_corpus([tmp_path])
    assert joined(corpus) == [*texts, texts[0]]
    pieces = list(corpus.pieces())
    assert all(0 < len(text) <= 200 for text, _ in pieces)
    assert all(text.endswith("\n") for text, last in pieces if "line" in text and not last)


def test_the_fingerprint_follows_names_and_contents(tmp_path):
    def fingerprint(name, text):
        path = tmp_path / name
        path.write_text(text)
        try:
            return read_corpus([path]).fingerprint
        finally:
            path.unlink()

    first = fingerprint("a.txt", "text")
    assert fingerprint("a.txt", "text") == first
    others = [fingerprint("b.txt", "text"), fingerprint("a.txt", "Text")]
    assert len({first, *others}) == 3
    for folder in ("here", "there/below"):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "data" / "x.txt").write_text("same")
    here, there = (read_corpus([tmp_path / f / "data"]) for f in ("here", "there/below"))
    assert here.fingerprint == there.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt does not exist"),
        ("empty.txt", b"", "empty.txt holds no text"),
        ("empty.jsonl", b"\n\n", "empty.jsonl holds no text"),
        ("photo.jpg", b"\xff\xd8\xff\xe0", "photo.jpg cannot be read as text"),
        ("zeros", b"ab\0", "zeros cannot be read as text .*zero bytes"),
        ("cut.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], "cut.gz cannot be read"),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', "list.jsonl .*line 2"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl cannot be read"),
    ],
)
def test_a_named_file_that_is_no_text_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_corpus([tmp_path / name])


def test_paths_are_read_in_their_order_and_each_must_hold_text(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.bin").write_bytes(b"\xff")
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert joined(read_corpus([tmp_path / "b", tmp_path / "a"])) == ["b", "a"]
    with pytest.raises(UserError, match="none holds no text"):
        read_corpus([tmp_path / "a", tmp_path / "none"])


def test_the_standard_library_is_there_without_its_tests():
    corpus = standard_library()
    names = {name for _, name in corpus.files}
    assert {"argparse.py", "json/decoder.py"} <= names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert "json" in folders and "unittest" in folders
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert corpus.size_bytes > 5e6 and not corpus.skipped
    assert "standard library" in corpus.description


def test_a_run_below_the_text_is_no_text(tmp_path):
    """It changes as it goes: the same command would find another text."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "8" / "_METADATA").write_text("{}")
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert joined(read_corpus([tmp_path])) == ["text"]
