"""python -m gpt.data prepare: from text to a folder that train.py takes."""

import json
import shutil

import pytest
import standin_tokenizers
from programs import call, program, snapshot

from gpt.data import tokenizers
from gpt.data.dataset import load_dataset
from gpt.data.options import DataOptions
from gpt.errors import UserError


def prepare(*argv):
    return call("gpt/data/__main__", "prepare", *argv)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "data.json"
    docs = [f"the {i} rivers and the hill" for i in range(100)]
    path.write_text("".join(json.dumps({"content": doc}) + "\n" for doc in docs))
    return path


def test_text_is_prepared_once_and_trained_on_anywhere(lines, tmp_path):
    argv = [lines, "--text-column", "content", "--tokenizer", "byte"]
    done = prepare(*argv, "--out", tmp_path / "tokens", "--val-fraction", "0.2")
    assert done.code == 0, done.err
    assert "of 100 documents" in done.err and str(tmp_path / "tokens") in done.err
    again = prepare(*argv, "--out", tmp_path / "tokens", "--val-fraction", "0.2")
    assert again.code == 0 and "prepared in" not in again.err
    lines.unlink()
    moved = shutil.move(tmp_path / "tokens", tmp_path / "elsewhere")
    notes = []
    tokenizer, dataset = load_dataset(
        [moved], "bpe", 300, DataOptions(), store=tmp_path / "store", log=notes.append
    )
    assert tokenizer.name == "byte" and len(dataset.train) > 4 * len(dataset.val) / 2 > 0
    assert str(moved) in notes[0] and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data.json", "--tokenizer", "byte", "--out", "x"], "--text-column: 'content'"),
        (["gone", "--tokenizer", "byte", "--out", "x"], "gone does not exist"),
        (["data.json", "--tokenizer", "gone", "--out", "x"], "'gone' is neither a tokenizer"),
        (["data.json", "--tokenizer", "byte", "--out", "full"], "full exists already"),
        (["--tokenizer", "byte", "--out", "x"], "prepare needs a SOURCE"),
        (["data.json", "--tokenizer", "byte", "--out", "x", "--workers", "0"], "workers is 0"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(argv, message, lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    if "--text-column" not in message:
        argv = [*argv, "--text-column", "content"]
    before = snapshot(tmp_path)
    done = prepare(*argv)
    assert done.code == 2 and message in done.err.splitlines()[-1]
    assert snapshot(tmp_path) == before


def test_ctrl_c_says_how_to_go_on(lines, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt.data.prepare.tokenize", stop)
    argv = ["prepare", lines, "--text-column", "content", "--tokenizer", "byte", "--out", "x"]
    with pytest.raises(KeyboardInterrupt):
        program("gpt/data/__main__").main([str(word) for word in argv])
    assert "to go on: repeat the command" in capsys.readouterr().err


def test_a_command_is_needed():
    done = call("gpt/data/__main__", "tokenize")
    assert done.code == 2 and done.err == "error: 'tokenize' is not a command: expected prepare\n"
    assert "SOURCE" in call("gpt/data/__main__", "--help").out


@pytest.mark.parametrize("form", ["GPT-2", "Llama 3", "TinyLlama", "Unigram"])
def test_a_tokenizer_json_trains_a_model_from_nothing(form, lines, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(standin_tokenizers.make(form))
    found = tokenizers.create(str(tmp_path / "tokenizer.json"), lambda: (), 0)
    text = "the cat sat 今天"
    assert max(found.encode_ordinary(text)) < found.n_vocab
    end = {"GPT-2": "<|endoftext|>", "Llama 3": "<|end_of_text|>"}.get(form, "</s>")
    assert found.decode([found.eot_token]) == end
    # Another end is named as transformers does, and the folder may be given.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "t"}}))
    again = tokenizers.create(str(tmp_path), lambda: (), 0)
    assert again.decode([again.eot_token]) in ("t", " t")
    assert tokenizers.digest(tokenizers.from_json(tokenizers.to_json(again))) == tokenizers.digest(
        again
    )


def test_vocab_and_merges_are_gpt2s_tokenizer(tmp_path):
    whole = standin_tokenizers.make("GPT-2")
    model = json.loads(whole)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "tokenizer.json").write_bytes(whole)
    expected = tokenizers.load(tmp_path / "whole" / "tokenizer.json")
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        found = tokenizers.create(str(path), lambda: (), 0)
        for text in standin_tokenizers.WILD:
            assert found.encode_ordinary(text) == expected.encode_ordinary(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": '{"model": {}}'}, "tokenizer.json cannot be read"),
        ({"vocab.json": "{}"}, "no merges.txt"),
        ({"vocab.json": "{", "merges.txt": ""}, "cannot be read"),
        ({"other": ""}, "is neither a tokenizer nor a file"),
    ],
)
def test_tokenizers_that_cannot_be_used(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        tokenizers.create(str(tmp_path), lambda: (), 0)


def test_options_survive_a_checkpoint(tmp_path):
    for options in (DataOptions(), DataOptions(val_data=(tmp_path / "x",), tokens=tmp_path)):
        assert DataOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
