"""Text becomes tokens once, in shards that are the same however they were made."""

import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data_files
import numpy as np
import psutil
import pytest
from data_files import BYTE, PLAIN

from gpt.data import formats, prepare, token_files, tokenizers
from gpt.data.options import Reading
from gpt.data.prepare import Job, tokenize
from gpt.data.sources import find, open_text
from gpt.errors import UserError

END = BYTE.eot_token


def write(folder, *texts):
    """The text of a folder of these, one file each."""
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04}.txt").write_bytes(text.encode())
    return open_text(find([folder]), PLAIN)


def make(text, folder, tokenizer=BYTE, held_out=None, **options):
    """Both splits of a text, tokenized into `folder`."""
    tokenize(Job(text, tokenizer, PLAIN, held_out, **options), folder, "f", {"name": "hash"})
    return token_files.open_shards(folder, tokenizer)


def text_of(tokens):
    return BYTE.decode([i for i in tokens[:].tolist() if i != END])


def documents(tokens):
    ids = tokens[:]
    assert ids[-1] == END
    return BYTE.decode(ids.tolist()).split("<|endoftext|>")[:-1]


def test_one_file_is_split_as_nanogpt_does(tmp_path, monkeypatch):
    """Also where it is read in many pieces."""
    monkeypatch.setattr(formats, "PIECE", 50)
    monkeypatch.setattr(prepare, "GROUP", 100)
    text = "".join(chr(0x4E00 + i) for i in range(1234))
    data = make(write(tmp_path / "text", text), tmp_path / "tokens")
    assert text_of(data["train"]) == text[: int(1234 * 0.9)]
    assert text_of(data["val"]) == text[int(1234 * 0.9) :]
    assert END not in data["train"][:] and END not in data["val"][:]
    assert (data["train"].n_bytes, data["val"].n_bytes) == (1110 * 3, 124 * 3)
    half = make(write(tmp_path / "text", text), tmp_path / "half", held_out=0.5)
    assert text_of(half["val"]) == text[617:]


def test_few_documents_hold_out_the_tail_of_all(tmp_path):
    data = make(write(tmp_path / "text", "a" * 60, "b" * 40), tmp_path / "tokens")
    assert text_of(data["train"]) == "a" * 60 + "b" * 30 and text_of(data["val"]) == "b" * 10
    assert data["train"][:][60] == END and data["val"][:][-1] == END
    assert data["train"][:].tolist().count(END) == 1
    # Many that are all alike would be held out together or not at all.
    data = make(write(tmp_path / "alike", *["same"] * 30), tmp_path / "alike tokens")
    assert len(data["train"]) > 5 * len(data["val"]) > 0


def joined(texts):
    return "<|endoftext|>".join(texts)


def test_many_documents_hold_out_whole_ones_by_their_content(tmp_path):
    texts = [f"document {i} " + "x" * 50 for i in range(400)]
    data = make(write(tmp_path / "text", joined(texts)), tmp_path / "tokens")
    train, held_out = documents(data["train"]), documents(data["val"])
    assert sorted(train + held_out) == sorted(texts)
    assert 0.02 < len(held_out) / 400 < 0.09
    more = [f"another {i} " + "x" * 50 for i in range(400)]
    grown = make(write(tmp_path / "text", joined(more + texts)), tmp_path / "grown")
    assert set(held_out) <= set(documents(grown["val"]))  # growth moves nothing into training
    fifth = make(write(tmp_path / "text", joined(texts)), tmp_path / "fifth", held_out=0.2)
    assert 0.15 < len(documents(fifth["val"])) / 400 < 0.26
    for held_out, split in ((0, "train"), (1, "val")):
        whole = make(write(tmp_path / "text", joined(texts)), tmp_path / split, held_out=held_out)
        assert whole.keys() == {split}


def corpus(folder):
    """Text of several tasks, with long documents."""
    rng = random.Random(0)
    words = ["river", "hill", "the", "é", "\n"]
    texts = [" ".join(rng.choices(words, k=rng.choice([5, 50, 1000]))) for _ in range(150)]
    return write(folder, *texts)


@pytest.fixture
def many_tasks(monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 1000)
    monkeypatch.setattr(prepare, "GROUP", 3000)
    monkeypatch.setattr(prepare, "TASK_BYTES", 20_000)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_stopped_goes_on_to_the_same_bytes(tmp_path, many_tasks, monkeypatch):
    text = corpus(tmp_path / "text")
    make(text, tmp_path / "whole", held_out=0.2)
    expected = content(tmp_path / "whole")
    assert len(expected) > 8
    rng = random.Random(1)
    journal = prepare.write_journal
    encoded = []
    encode = prepare.encode
    monkeypatch.setattr(prepare, "encode", lambda *args: encoded.append(1) or encode(*args))

    def fail_at_random(path, counts):
        journal(path, counts)
        if not counts.is_done and rng.random() < 0.2:
            # As a kill would leave it: more tokens than the journal knows of.
            with (path.parent / f"train-{path.stem}.bin").open("ab") as shard:
                shard.write(b"more")
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_journal", fail_at_random)
    stops = 0
    while not (tmp_path / "stopped").exists():
        try:
            make(text, tmp_path / "stopped", held_out=0.2)
        except KeyboardInterrupt:
            stops += 1
    assert stops > 3 and content(tmp_path / "stopped") == expected
    assert len(encoded) < 60  # what was done was not done again
    assert [path.name for path in tmp_path.glob(".unfinished*")] == []


def test_what_was_left_of_another_text_is_not_used(tmp_path, many_tasks, monkeypatch):
    text = corpus(tmp_path / "text")
    monkeypatch.setattr(prepare, "write_journal", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(text, tmp_path / "tokens")
    monkeypatch.undo()
    job = Job(write(tmp_path / "other", "hello world " * 20), BYTE, PLAIN, None)
    tokenize(job, tmp_path / "tokens", "another", {})
    tokenize(job, tmp_path / "fresh", "another", {})
    assert content(tmp_path / "tokens") == content(tmp_path / "fresh")


KILLED = """
import sys
from pathlib import Path
from gpt.data import formats, prepare, tokenizers
from gpt.data.options import Reading
from gpt.data.sources import find, open_text
if __name__ == "__main__":
    prepare.WORTH_WORKERS = 0
    prepare.TASK_BYTES = 2**17
    prepare.GROUP = 2**14
    text = open_text(find([Path(sys.argv[1])]), Reading())
    tokenizer = tokenizers.create("byte", lambda: [], 0)
    workers = int(sys.argv[3])
    job = prepare.Job(text, tokenizer, Reading(), 0.2, workers=workers)
    prepare.tokenize(job, Path(sys.argv[2]), "f", {})
"""


def test_workers_change_no_byte_and_end_with_their_parent(tmp_path, monkeypatch):
    """Killed while its workers work, the next one goes on, in one process or in two."""
    rng = random.Random(0)
    write(tmp_path / "text", *(" ".join(rng.choices(["a", "bc", "é"], k=5000)) for _ in range(90)))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    argv = [sys.executable, script, tmp_path / "text"]
    subprocess.run([*argv, tmp_path / "one", "1"], check=True, timeout=60)
    killed = subprocess.Popen([*argv, tmp_path / "two", "2"])
    while not list(tmp_path.glob(".unfinished-two/*.bin")):
        time.sleep(0.05)
    workers = psutil.Process(killed.pid).children()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) >= 2 and not alive
    assert not (tmp_path / "two").exists()
    subprocess.run([*argv, tmp_path / "two", "2"], check=True, timeout=60)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("train*.bin"))) > 3


def test_a_failure_in_a_worker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WORTH_WORKERS", 0)
    monkeypatch.setattr(prepare, "TASK_BYTES", 1)
    char = tokenizers.create("char", lambda: ["abc"], 0)
    text = write(tmp_path / "text", *["abc"] * 25, "d")
    with pytest.raises(UserError, match="characters: 'd'"):
        make(text, tmp_path / "tokens", char, workers=2)


def test_one_tokenizes_while_another_waits(tmp_path):
    text = write(tmp_path / "text", "hello world " * 20)
    calls = []
    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(make, text, tmp_path / "tokens", progress=lambda *step: calls.append(step))
            for _ in range(2)
        ]
    assert [len(one.result()["train"]) for one in both] == [216, 216]
    assert len(calls) == calls.index((240, 240)) + 1


def test_a_change_during_reading_is_noticed(tmp_path):
    text = write(tmp_path / "text", "hello world " * 20)
    (tmp_path / "text" / "0000.txt").write_text("shorter than before")
    with pytest.raises(UserError, match=r"0000.txt changed while it was read"):
        make(text, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_types_follow_the_vocabulary(tmp_path):
    characters = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x13000)]))
    large = tokenizers.CharTokenizer(characters)
    data = make(write(tmp_path / "text", characters), tmp_path / "large", large)
    assert data["train"][:].dtype == data["val"][:].dtype == np.uint32
    assert large.decode([*data["train"][:].tolist(), *data["val"][:].tolist()]) == characters
    assert token_files.token_type(tokenizers.CharTokenizer(characters[: 2**16 - 1])) == np.uint16
    assert token_files.token_type(tokenizers.CharTokenizer(characters[: 2**16])) == np.uint32


def test_progress_is_reported_in_bytes_of_the_files(tmp_path, many_tasks):
    text = write(tmp_path / "text", "é" * 10_000, "é" * 5_000)
    seen = []
    make(text, tmp_path / "tokens", progress=lambda *step: seen.append(step))
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == (30_000, 30_000)


def test_too_little_text_is_refused(tmp_path):
    for text in ("a", "abcdefghij"):
        with pytest.raises(UserError, match=r"too small: its .* characters"):
            make(write(tmp_path / "text", text), tmp_path / "tokens")


def test_bad_documents_are_counted_in_the_header(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    lines[50] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    reading = Reading(skip_bad_documents=True)
    folder = data_files.tokenize(tmp_path / "a.jsonl", tmp_path / "tokens", reading=reading)
    header = token_files.read_header(folder)
    assert (header["documents"], header["bad_documents"]) == (99, 1)
    assert "a.jsonl, line 51" in header["first_bad"]


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    """50 MB of text, most of it on one line, need as little memory as 5 MB would."""
    import tracemalloc

    path = tmp_path / "large.txt"
    path.write_bytes(b"word " * 6_000_000 + b"word word word\n" * 1_400_000)
    bpe = tokenizers.create("bpe", lambda: ["word word word\n"], 300)
    text = open_text(find([path]), PLAIN)
    tracemalloc.start()
    data = make(text, tmp_path / "tokens", bpe)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data["train"].n_bytes + data["val"].n_bytes == Path(path).stat().st_size
    assert peak < 100e6
