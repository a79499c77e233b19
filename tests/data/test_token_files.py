"""Text becomes tokens once, in two files that say what they are."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpt.data import corpus as corpora
from gpt.data import token_files, tokenizers
from gpt.data.corpus import read_corpus
from gpt.data.token_files import tokenize
from gpt.errors import UserError

BYTE = tokenizers.create("byte", lambda: [], 0)
END = BYTE.eot_token


def write(folder, *texts):
    """A corpus of these texts, one file each."""
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04}.txt").write_bytes(text.encode())
    return read_corpus([folder])


def text_of(tokens) -> str:
    return BYTE.decode([i for i in tokens.array.tolist() if i != END])


def test_one_file_is_split_as_nanogpt_does(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(1234))
    data = tokenize(write(tmp_path / "text", text), BYTE, tmp_path / "cache")
    assert text_of(data.train) == text[: int(1234 * 0.9)]
    assert text_of(data.val) == text[int(1234 * 0.9) :]
    assert END not in data.train.array and END not in data.val.array
    assert (data.train.n_bytes, data.val.n_bytes) == (1110 * 3, 124 * 3)
    assert len(data.train) == 1110 * 3


def test_a_long_file_is_split_the_same_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 50)
    text = "some words and then a line end\n" * 100
    data = tokenize(write(tmp_path / "text", text), BYTE, tmp_path / "cache")
    assert text_of(data.train) + text_of(data.val) == text
    assert len(data.train) == int(len(text) * 0.9)


def test_few_documents_hold_out_the_tail_of_all(tmp_path):
    data = tokenize(write(tmp_path / "text", "a" * 60, "b" * 40), BYTE, tmp_path / "cache")
    assert text_of(data.train) == "a" * 60 + "b" * 30 and text_of(data.val) == "b" * 10
    assert data.train.array[60] == END and data.val.array[-1] == END
    assert data.train.array.tolist().count(END) == 1
    # Many that are all alike would be held out together or not at all.
    data = tokenize(write(tmp_path / "alike", *["same"] * 30), BYTE, tmp_path / "cache")
    assert len(data.train) > 5 * len(data.val) > 0


def test_many_documents_hold_out_whole_ones_by_their_content(tmp_path):
    texts = [f"document {i} " + "x" * 50 for i in range(400)]
    data = tokenize(write(tmp_path / "text", *texts), BYTE, tmp_path / "cache")

    def documents(tokens):
        assert tokens.array[-1] == END
        return BYTE.decode(tokens.array.tolist()).split("<|endoftext|>")[:-1]

    train, held_out = documents(data.train), documents(data.val)
    assert sorted(train + held_out) == sorted(texts)
    assert 0.02 < len(held_out) / 400 < 0.09
    more = [f"another {i} " + "x" * 50 for i in range(400)]
    grown = tokenize(write(tmp_path / "text", *more, *texts), BYTE, tmp_path / "cache")
    assert set(held_out) <= set(documents(grown.val))  # growth moves nothing into training


def test_what_is_in_the_cache_is_not_encoded_again(tmp_path, monkeypatch):
    corpus = write(tmp_path / "text", "hello world " * 20)
    first = tokenize(corpus, BYTE, tmp_path / "cache")
    monkeypatch.setattr(token_files, "write_tokens", None)
    again = tokenize(corpus, BYTE, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train.array, first.train.array)
    with pytest.raises(TypeError):  # another text, another tokenizer: both are encoded
        tokenize(write(tmp_path / "text", "hello"), BYTE, tmp_path / "cache")
    with pytest.raises(TypeError):
        char = tokenizers.create("char", corpus.documents, 0)
        tokenize(corpus, char, tmp_path / "cache")


def folders(cache):
    """What is in a cache beside the locks."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    corpus = write(tmp_path / "text", "hello world " * 20)
    monkeypatch.setattr(token_files.tokenizers, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize(corpus, BYTE, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_one_tokenizes_while_another_waits(tmp_path):
    corpus = write(tmp_path / "text", "hello world " * 20)
    calls = []
    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(
                tokenize, corpus, BYTE, tmp_path / "cache", lambda *step: calls.append(step)
            )
            for _ in range(2)
        ]
    assert [len(one.result().train) for one in both] == [216, 216]
    assert len(calls) == len(folders(tmp_path / "cache")) == 1


def test_a_change_during_reading_is_noticed(tmp_path):
    corpus = write(tmp_path / "text", "hello world " * 20)
    (tmp_path / "text" / "0000.txt").write_text("shorter")
    with pytest.raises(UserError, match="changed while it was read"):
        tokenize(corpus, BYTE, tmp_path / "cache")


def test_types_follow_the_vocabulary(tmp_path):
    characters = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x13000)]))
    corpus = write(tmp_path / "text", characters)
    large = tokenizers.create("char", corpus.documents, 0)
    assert large.n_vocab > 2**16
    data = tokenize(corpus, large, tmp_path / "cache")
    assert data.train.array.dtype == data.val.array.dtype == np.uint32
    assert large.decode([*data.train.array.tolist(), *data.val.array.tolist()]) == characters
    assert tokenize(corpus, BYTE, tmp_path / "cache").train.array.dtype == np.uint16
    assert token_files.token_type(tokenizers.CharTokenizer(characters[: 2**16 - 1])) == np.uint16
    assert token_files.token_type(tokenizers.CharTokenizer(characters[: 2**16])) == np.uint32


def test_progress_is_reported_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 50)
    monkeypatch.setattr(token_files, "PIECE", 50)
    corpus = write(tmp_path / "text", "é" * 10_000)
    seen = []
    tokenize(corpus, BYTE, tmp_path / "cache", lambda *step: seen.append(step))
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == (20_000, 20_000)
    assert {total for _, total in seen} == {20_000}


@pytest.mark.parametrize("text", ["a", "abcdefghij"])
def test_too_little_text_is_refused(text, tmp_path):
    char = tokenizers.create("char", lambda: [text], 0)
    with pytest.raises(UserError, match=r"too small: its .* characters"):
        tokenize(write(tmp_path / "text", text), char, tmp_path / "cache")


def prepared(tmp_path):
    """The one folder of shards in a fresh cache."""
    tokenize(write(tmp_path / "text", "hello world " * 20), BYTE, tmp_path / "cache")
    (folder,) = folders(tmp_path / "cache")
    return folder


def test_prepared_shards_are_recognised_and_opened(tmp_path):
    folder = prepared(tmp_path)
    assert token_files.is_prepared(folder)
    for path in (tmp_path, tmp_path / "missing", tmp_path / "text" / "0000.txt"):
        assert not token_files.is_prepared(path)
    own = tokenizers.load(folder / "tokenizer.json")
    assert len(token_files.open_shards(folder, own).val) == 24
    char = tokenizers.create("char", lambda: ["helo wrd"], 0)
    with pytest.raises(UserError, match=r"another tokenizer: pass --tokenizer .*tokenizer.json"):
        token_files.open_shards(folder, char)


@pytest.mark.parametrize(
    "change",
    [
        "[]",
        "{",
        {"version": 2},
        {"splits": {}},
        {"splits": {s: {"tokens": "216", "text_bytes": 1} for s in ("train", "val")}},
        {"splits": {s: {"tokens": 215, "text_bytes": 215} for s in ("train", "val")}},
    ],
)
def test_a_wrong_header_is_refused(change, tmp_path):
    path = prepared(tmp_path) / "tokens.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with pytest.raises(UserError, match="damaged, delete the folder"):
        token_files.open_shards(path.parent, BYTE)


def test_truncated_or_missing_token_files_are_refused(tmp_path):
    folder = prepared(tmp_path)
    whole = (folder / "val.bin").read_bytes()
    for content in (whole[:-2], whole[:-1], b""):
        (folder / "val.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"val\.bin"):
            token_files.open_shards(folder, BYTE)
    (folder / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val\.bin"):
        token_files.open_shards(folder, BYTE)


def test_nanogpts_headerless_files_are_read(tmp_path):
    ids = {"train": [104, 105, 256, 104] * 100, "val": [104, 105] * 20}
    for split, tokens in ids.items():
        np.array(tokens, "<u2").tofile(tmp_path / f"{split}.bin")
    assert token_files.is_prepared(tmp_path)
    data = token_files.open_headerless(tmp_path, BYTE)
    assert data.train.array.tolist() == ids["train"] and data.val.array.tolist() == ids["val"]
    assert (data.train.n_bytes, data.val.n_bytes) == (300, 40)  # end-of-text is no text
    np.array([104, 257], "<u2").tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match=r"val\.bin holds token 257, but byte has only 257"):
        token_files.open_headerless(tmp_path, BYTE)
    changed = [*ids["val"][:-1], 106]
    np.array(changed, "<u2").tofile(tmp_path / "val.bin")
    assert token_files.open_headerless(tmp_path, BYTE).fingerprint != data.fingerprint


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path, monkeypatch):
    """50 MB of text, most of it on one line, need as little memory as 5 MB would."""
    monkeypatch.setattr(token_files, "THREADS", 2)
    path = tmp_path / "large.txt"
    path.write_bytes(b"word " * 6_000_000 + b"word word word\n" * 1_400_000)
    bpe = tokenizers.create("bpe", lambda: ["word word word\n"], 300)
    tracemalloc.start()
    data = tokenize(read_corpus([path]), bpe, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.train.n_bytes + data.val.n_bytes == path.stat().st_size
    assert peak < 45e6
