"""Which files are read: folders, patterns, links, and what is passed over, each with a word."""

import os

import pytest
from data_files import PLAIN, write

from gpt.data.options import Reading
from gpt.data.sources import find, open_text, standard_library
from gpt.errors import UserError


def names(source):
    return [file.name for file in source.files]


def texts(paths, reading=PLAIN):
    return [text for text, _ in open_text(find(paths), reading).pieces(reading) if text]


def test_folders_are_read_in_order_without_hidden_and_binary_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text("two " * 9)
    (tmp_path / "c.txt").write_text("three é", encoding="utf-8")
    (tmp_path / "a.py").write_text("one")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git" / "x").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "zeros.bin").write_bytes(b"a\0b")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\0")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    text = open_text(find([tmp_path]), PLAIN)
    assert [file.name for file in text.files] == ["a.py", "b/two.md", "c.txt"]
    assert text.description.startswith("3 files (3 text), 47 bytes")
    (note,) = text.notes
    assert "2 files, not text: photo.jpg (it holds zero bytes), zeros.bin" in note


def test_paths_are_read_in_their_order_and_patterns_sorted(tmp_path):
    for name in "bac":
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts([tmp_path / "b.txt", tmp_path / "a.txt"]) == ["b", "a"]
    assert texts([tmp_path / "[ab].*"]) == ["a", "b"]
    for missing in ("missing.txt", "*.parquet"):
        with pytest.raises(UserError, match="does not exist"):
            find([tmp_path / "a.txt", tmp_path / missing])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no text"):
        find([tmp_path / "a.txt", tmp_path / "none"])


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "x.txt").write_text("linked")
    data = tmp_path / "data"
    (data / "real").mkdir(parents=True)
    (data / "real" / "y.txt").write_text("real")
    (data / "real" / "up").symlink_to(data)  # a circle
    (data / "one").symlink_to(tmp_path / "elsewhere")
    (data / "two").symlink_to(tmp_path / "elsewhere" / "deep")  # which `one` holds already
    (data / "z.txt").symlink_to(tmp_path / "elsewhere" / "deep" / "x.txt")  # as hubs' caches do
    assert names(find([data])) == ["one/deep/x.txt", "real/y.txt", "z.txt"]
    (tmp_path / "link").symlink_to(data)
    assert names(find([tmp_path / "link"])) == names(find([data]))


def test_a_run_below_the_text_is_no_text(tmp_path):
    """It changes as it goes: the same command would find another text."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "8" / "_METADATA").write_text("{}")
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert names(find([tmp_path])) == ["a.txt"]


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "data-00000.arrow"])
def test_what_describes_data_is_not_trained_on(name, tmp_path):
    """A dataset's card is no document of it."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    write(path, {".parquet": "parquet", ".jsonl": "JSON lines", ".arrow": "arrow"}[path.suffix])
    about = ["README.md", "LICENSE", "dataset_infos.json", "state.json"]
    for other in about:
        (tmp_path / other).write_text("{}")
    (tmp_path / "notes.txt").write_text("also text")
    text = open_text(find([tmp_path]), PLAIN)
    assert [file.name for file in text.files] == [f"data/{name}", "notes.txt"]
    assert all(any(other in note for note in text.notes) for other in about)
    path.unlink()
    assert "README.md" in [file.name for file in open_text(find([tmp_path]), PLAIN).files]


@pytest.mark.parametrize(
    "files",
    [
        ["dataset_dict.json", "train/x.arrow"],
        ["train-00000-of-00002.parquet", "test-00000-of-00001.parquet"],
        ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"],
        ["train.jsonl", "val.jsonl"],
    ],
)
def test_several_splits_are_refused(files, tmp_path):
    """The test set must not be trained on without a word."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"several splits of a dataset.*--val-data"):
        find([tmp_path])
    assert find([tmp_path / files[-1]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.zip", b"PK\x03\x04\x14\0\0\0", "zip archive"),
        ("x.gz", b"\x1f\x8b not gzip", "cannot be read"),
        ("x.json", b'{"content": "a"}\n' * 2, "--text-column"),
        ("x.dat", b"\0" * 100, "most of it is not text, 100 bytes against 4"),
    ],
)
def test_data_beside_text_that_cannot_be_read_stop_the_run(name, content, message, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_text(find([tmp_path]), PLAIN)
    text = open_text(find([tmp_path]), Reading(skip_bad_documents=True))
    assert [file.name for file in text.files] == ["a.txt"] and name in text.notes[0]


@pytest.mark.parametrize(("name", "content"), [("x.jpg", b"\xff\xd8\xff\0"), ("x.txt", b"")])
def test_a_named_file_without_text_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"x\.\w+ (cannot be read as text|holds no text)"):
        open_text(find([tmp_path / name]), PLAIN)


def test_the_standard_library_is_there_without_its_tests():
    source = standard_library()
    found = set(names(source))
    assert {"argparse.py", "json/decoder.py"} <= found
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert "json" in folders and "unittest" in folders
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not folders & {"encodings", "pydoc_data"}
    assert source.size > 5e6 and "standard library" in source.title
