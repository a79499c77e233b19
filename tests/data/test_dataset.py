"""What the user asked for becomes a tokenizer and a dataset, or one clear refusal."""

import gzip
import json
import os
import shutil

import numpy as np
import pytest
from filelock import FileLock
from programs import call, program

from gpt.data import dataset as datasets
from gpt.data import prepare, tokenizers
from gpt.data.dataset import load_dataset
from gpt.data.options import DataOptions
from gpt.data.token_files import Mixture
from gpt.errors import UserError

TEXT = "hello world\n" * 50


@pytest.fixture
def load(tmp_path):
    """Load a dataset, with its tokens kept in tmp_path/store."""

    def call(paths, tokenizer="byte", log=lambda line: None, options=None, **more):
        given = {"store": tmp_path / "store", "log": log} | more
        return load_dataset(paths, tokenizer, 300, options or DataOptions(), **given)

    return call


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    return tmp_path / "text"


def ids(tokens):
    return tokens[:].tolist()


def expected_of(dataset):
    """What a run's checkpoint keeps of its data, as JSON does."""
    return json.loads(json.dumps({"fingerprint": dataset.fingerprint, "files": dataset.files}))


def kept(tmp_path):
    """The folders of tokens in the store."""
    return [path for path in (tmp_path / "store").iterdir() if (path / "tokens.json").exists()]


def test_text_is_described_and_what_is_not_text_is_listed(load, text, tmp_path):
    (text / "photo.jpg").write_bytes(b"\xff\xd8\0")
    lines = []
    tokenizer, dataset = load([text], log=lines.append)
    assert tokenizer.decode([*dataset.train[:], *dataset.val[:]]) == TEXT
    assert "1 file (1 text), 600 bytes" in lines[0] and "--data PATH" not in lines[0]
    assert lines[1] == "skipped        1 file, not text: photo.jpg (it holds zero bytes)"
    assert "540 to train on and 60 held out, of 1 document (" in lines[2]
    assert str(kept(tmp_path)[0]) in lines[2] and "1.2 kB" in lines[2]


def test_a_start_reads_no_file_that_looks_as_before(load, text, tmp_path, monkeypatch):
    """By whatever path: renamed, by a pattern, one by one, through a link."""
    (text / "b.txt").write_text("more words\n" * 30)
    tokenizer, first = load([text], "bpe")
    for module, name in ((datasets, "open_text"), (prepare, "hash_file"), (prepare, "fill")):
        monkeypatch.setattr(module, name, None)
    text = text.rename(tmp_path / "renamed")
    (tmp_path / "link").symlink_to(text)
    for paths in ([text], [text / "*.txt"], [text / "a.txt", text / "b.txt"], [tmp_path / "link"]):
        _, again = load(paths, "bpe", expected=expected_of(first))
        assert again.fingerprint == first.fingerprint and ids(again.train) == ids(first.train)
    assert load([text], "bpe", saved_tokenizer=tokenizers.to_json(tokenizer))
    with pytest.raises(TypeError):  # another tokenizer, other text
        load([text], "byte")
    (text / "a.txt").write_text(TEXT + "more")
    with pytest.raises(TypeError):
        load([text], "bpe")


def test_files_with_another_time_are_hashed_and_not_tokenized_again(load, text, monkeypatch):
    _, first = load([text])
    monkeypatch.setattr(prepare, "fill", None)
    os.utime(text / "a.txt", (1, 1))
    assert load([text])[1].fingerprint == first.fingerprint
    monkeypatch.setattr(prepare, "hash_file", None)
    assert load([text])[1].fingerprint == first.fingerprint
    with pytest.raises(TypeError):
        load([text], options=DataOptions(verify_data=True))


def test_changed_text_is_refused_by_the_name_of_the_file(load, text):
    (text / "b.txt").write_text("second")
    tokenizer, dataset = load([text], "bpe")
    known = {"saved_tokenizer": tokenizers.to_json(tokenizer), "expected": expected_of(dataset)}
    status = os.stat(text / "a.txt")
    (text / "a.txt").write_text(TEXT.replace("w", "W"))
    os.utime(text / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    load([text], **known)  # it looks the same
    with pytest.raises(UserError, match=r"trained on different text \(a.txt has changed\)"):
        load([text], options=DataOptions(verify_data=True), **known)
    (text / "b.txt").unlink()
    (text / "c.txt").write_text("second")
    with pytest.raises(UserError, match=r"a.txt has changed; c.txt is new; b.txt is missing"):
        load([text], **known)
    (text / "a.txt").write_text(TEXT)
    (text / "c.txt").unlink()
    (text / "b.txt").write_text("second")
    assert load([text], **known)[1].fingerprint == dataset.fingerprint
    with pytest.raises(UserError, match="the tokenizer or the way the text is read differs"):
        load([text], options=DataOptions(separator="none"), **known)


def test_a_trial_leaves_nothing_and_uses_what_is_kept(load, text, tmp_path, monkeypatch):
    lines = []
    _, trial = load([text], keep=False, log=lines.append)
    assert "made again when training starts, 1.2 kB" in lines[-1]
    assert not (tmp_path / "store").exists() and len(trial.train) == 540
    load([text])
    monkeypatch.setattr(prepare, "fill", None)
    assert load([text], keep=False, log=lines.append)[1].fingerprint == trial.fingerprint
    assert f"in {tmp_path / 'store'}" in lines[-1]


def test_a_plan_of_much_text_counts_tokens_by_a_sample(load, tmp_path, monkeypatch):
    """Of each format by itself, since compressed text takes fewer bytes: one file of each."""
    monkeypatch.setattr(datasets, "SMALL", 100)
    monkeypatch.setattr(datasets, "SAMPLED_FILES", 1)
    monkeypatch.setattr(prepare, "hash_file", None)
    folder = tmp_path / "mixed"
    folder.mkdir()
    words = "the cat sat. " * 1000
    for number in range(4):
        (folder / f"{number}a.txt.gz").write_bytes(gzip.compress(words.encode()))
        (folder / f"{number}b.txt").write_text(words)
    lines = []
    tokenizer, plan = load([folder], "bpe", keep=False, estimate=True, log=lines.append)
    assert not (tmp_path / "store").exists() and "from a sample" in lines[1]
    exact = 8 * len(tokenizer.encode_ordinary(words))
    assert len(plan.train) + len(plan.val) == pytest.approx(exact, rel=0.01)


def test_leftovers_of_a_killed_process_are_removed(load, text, tmp_path):
    store = tmp_path / "store"
    left, used = store / ".unfinished-0123", store / ".unfinished-4567"
    for folder in (left, used):
        folder.mkdir(parents=True)
        (folder / "train-00000.bin").write_bytes(b"x" * 100)
    with FileLock(store / ".4567.lock"):  # a process is making them
        load([text])
        assert used.exists() and not left.exists() and len(kept(tmp_path)) == 1


def test_tokens_of_others_need_a_tokenizer_that_is_named(load, tmp_path):
    np.array([1, 2, 3] * 50, "<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for name in ("bpe", "char"):
        with pytest.raises(UserError, match=r"cannot be trained on tokens.*meta.pkl is not opened"):
            load([tmp_path], name)
    _, dataset = load([tmp_path], "byte")
    assert len(dataset.train) == 142 and len(dataset.val) == 8
    again = load([tmp_path / "train.bin"], "byte", expected=expected_of(dataset))[1]
    assert again.fingerprint == dataset.fingerprint


def test_held_out_text_of_its_own(load, text, tmp_path):
    (tmp_path / "val.jsonl").write_text('{"text": "held out"}\n{"text": "too"}')
    options = DataOptions(val_data=(tmp_path / "val.jsonl",))
    tokenizer, dataset = load([text], options=options)
    assert tokenizer.decode(ids(dataset.train)) == TEXT
    assert tokenizer.decode(ids(dataset.val)) == "held out<|endoftext|>too<|endoftext|>"
    # Prepared tokens and those of others serve as well.
    _, other = load([text])
    prepared = [f for f in kept(tmp_path) if f.name == other.fingerprint[:32]]
    _, dataset = load([text], options=DataOptions(val_data=tuple(prepared)))
    assert ids(dataset.val) == ids(other.val) and len(dataset.train) == 600
    np.array([1, 2, 3] * 50, "<u2").tofile(tmp_path / "web_train_01.bin")
    _, dataset = load([text], options=DataOptions(val_data=(tmp_path / "web_train_01.bin",)))
    assert len(dataset.val) == 150


def test_several_sources_have_weights(load, text, tmp_path):
    (tmp_path / "b.txt").write_text("other words\n" * 30)
    np.array([1, 2, 3] * 50, "<u2").tofile(tmp_path / "train.bin")
    paths = [f"{text}=7", f"{tmp_path}/b.tx*=2", f"{tmp_path}/train.bin=1"]
    _, dataset = load([type(text)(path) for path in paths])
    assert isinstance(dataset.train, Mixture) and dataset.train.weights == [0.7, 0.2, 0.1]
    assert [len(source) for source in dataset.train.sources] == [540, 324, 142]
    assert len(dataset.val) == 60 + 36 + 8
    with pytest.raises(UserError, match="give one to each, as in"):
        load([type(text)(path) for path in (*paths[:2], tmp_path / "train.bin")])
    with pytest.raises(UserError, match="less than a thousandth"):
        load([type(text)(path) for path in (paths[0], f"{tmp_path}/b.txt=0.001")])


def test_a_folder_for_tokens_may_be_chosen(load, text, tmp_path):
    load([text], options=DataOptions(tokens=tmp_path / "large disk"))
    assert not (tmp_path / "store").exists()
    assert len(list((tmp_path / "large disk").glob("*/tokens.json"))) == 1
    with pytest.raises(UserError, match=r"cannot write tokens to .*a\.txt"):
        load([text], options=DataOptions(tokens=text / "a.txt"))


# python -m gpt.data prepare: from text to a folder that train.py takes.


def prepare_tokens(*argv):
    return call("gpt/data/__main__", "prepare", *argv)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "data.json"
    docs = [f"the {i} rivers and the hill" for i in range(100)]
    path.write_text("".join(json.dumps({"content": doc}) + "\n" for doc in docs))
    return path


def test_text_is_prepared_once_and_trained_on_anywhere(load, lines, tmp_path):
    argv = [lines, "--text-column", "content", "--tokenizer", "byte", "--val-fraction", "0.2"]
    done = prepare_tokens(*argv, "--out", tmp_path / "tokens")
    assert done.code == 0, done.err
    assert "of 100 documents" in done.err and str(tmp_path / "tokens") in done.err
    again = prepare_tokens(*argv, "--out", tmp_path / "tokens")
    assert again.code == 0 and "prepared in" not in again.err
    moved = shutil.move(tmp_path / "tokens", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="give each a weight"):
        load([moved, lines])
    lines.unlink()
    notes = []
    tokenizer, dataset = load([moved], "bpe", log=notes.append)
    assert tokenizer.name == "byte" and len(dataset.train) > 4 * len(dataset.val) / 2 > 0
    assert str(moved) in notes[0] and not (tmp_path / "store").exists()
    with pytest.raises(UserError, match="trained on different text"):
        load([moved], expected={"fingerprint": "0" * 64})


def test_ctrl_c_says_how_to_go_on(lines, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt.data.prepare.tokenize", stop)
    done = call("gpt/data/__main__", "tokenize")
    assert done.err == "error: unknown command 'tokenize': expected prepare\n"
    argv = ["prepare", lines, "--text-column", "content", "--tokenizer", "byte", "--out", "x"]
    with pytest.raises(KeyboardInterrupt):
        program("gpt/data/__main__").main([str(word) for word in argv])
    assert "repeat the command to continue" in capsys.readouterr().err


def test_options_survive_a_checkpoint(tmp_path):
    for options in (DataOptions(), DataOptions(val_data=(tmp_path / "x",), tokens=tmp_path)):
        assert DataOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
