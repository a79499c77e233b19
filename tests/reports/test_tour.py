"""The tour page, read as text: what it shows of a prompt in any script, and how large it is."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest
from programs import call
from reports.made_up import random_record

from gpt.data.tokenizers import IdTokenizer
from gpt.reports import tour
from gpt.reports.tour_recorder import record_tour
from gpt.sampling import language_model
from gpt.sampling.settings import Settings


def take(folder, *argv):
    """The page of python -m gpt.tour ARGV, which must succeed."""
    done = call("gpt/tour", *argv, "--out", folder / "tour.html")
    assert done.code == 0, done.err
    return (folder / "tour.html").read_text(encoding="utf-8")


def data_of(text):
    """What the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def unpack(packed):
    """As tour.js does."""
    levels = np.frombuffer(base64.b64decode(packed["data"]), "<u2").reshape(packed["shape"])
    return packed["low"] + levels * packed["width"] / 65535


@pytest.fixture(scope="module")
def toured(trained, tmp_path_factory):
    """The page of a Chinese and hostile prompt through a trained run."""
    argv = ["--prompt", "天<b>气", "--max-new-tokens", "4"]
    return take(tmp_path_factory.mktemp("tour"), trained[1], *argv)


def test_a_prompt_in_chinese_is_text_and_its_tokens_bytes(toured):
    assert "天&lt;b&gt;气" in toured and "<b>气" not in toured
    assert "\\xe5" in toured and 'title="part of 天"' in toured
    assert data_of(toured)["tokens"][0] == ["\\xe5", 1, "天"]
    assert toured.count("<script") == 2 and "src=" not in toured


def test_the_page_holds_the_recorded_numbers(trained, toured):
    settings = Settings(max_new_tokens=4, temperature=0.8, top_k=50, top_p=0.9)
    record = record_tour(language_model.load(trained[1]), "天<b>气", settings)
    data = data_of(toured)
    for name in ("scores", "weights"):
        error = np.abs(unpack(data[name]) - record.attention_map(name)).max()
        assert error <= data[name]["width"] / 65535
    assert unpack(data["q"]).shape == record.by_position("q").shape
    assert data["prefilled"] == len(record.prompt_ids)
    assert data["following"][:-1] == record.read_ids[1:]


def test_the_page_shows_what_sample_py_writes(trained, tmp_path):
    """With the checkpoint and the weights that were asked for; the prompt ends in a character."""
    argv = ["--step", "8", "--weights", "raw", "--max-new-tokens", "4", "--temperature", "0.8"]
    argv += ["--prompt-ids", "116 104 101 32 104 105 32 229 164"]
    page = take(tmp_path, trained[1], *argv)
    done = call("sample", trained[1], *argv, "--top-k", "50", "--top-p", "0.9", "--json")
    assert f"<pre>the hi <b>{tour.escape(json.loads(done.out)['text'])}</b></pre>" in page
    assert "step 8: " in page and data_of(page)["prefilled"] == 9


def test_a_model_without_a_tokenizer_takes_ids(trained, tmp_path, monkeypatch):
    model = language_model.load(trained[1])
    model = dataclasses.replace(model, tokenizer=IdTokenizer(model.tokenizer.n_vocab))
    monkeypatch.setattr(language_model, "load", lambda *_: model)
    ids = " 5  17 250 1 2 3 4 5 6"
    page = take(tmp_path, "run", "--prompt-ids", ids, "--max-new-tokens", "4")
    assert "How “&lt;5&gt;&lt;17&gt;&lt;250&gt;" in page
    for argv in ([], ["--prompt", "text"]):
        done = call("gpt/tour", "run", *argv, "--out", tmp_path / "b.html")
        assert done.code == 2 and "came without a tokenizer" in done.err
        assert done.err.endswith('--prompt-ids "1 2 3"\n') and done.err.count("\n") == 1


def test_prefill_and_each_step_say_what_they_read_and_wrote(toured):
    assert toured.count('<article class="step"') == 4
    assert "Wrote slots 0 to 8" in toured and "Read nothing: the cache was empty" in toured
    assert "Wrote slot 9" in toured and "Read 11 positions" in toured
    assert toured.count('class="slot written"') == 9 + 3 + 1  # and one in the legend
    assert '<th scope="col">top-p</th>' in toured and "operations per byte" in toured


def test_the_largest_page_stays_small():
    """64 tokens through 12 layers of 12 heads of width 64."""
    record, model = random_record(12, 12, 64, T=57, n_new=8)
    assert len(record.read_ids) == 64
    assert len(tour.build_tour(record, model, "x").encode()) < 15e6


def test_whole_partial_and_mixed_tokens():
    tokens = [b" \n", "气".encode(), " 天".encode()[:2], " 天".encode()[2:], b"\xff", b"\x1b"]
    shown = tour.display_tokens(range(6), lambda ids: b"".join(tokens[i] for i in ids))
    assert [one.text for one in shown] == ["␣⏎", "气", "␣\\xe5", "\\xa4\\xa9", "\\xff", "\\x1b"]
    assert [one.is_partial for one in shown] == [False, False, True, True, True, False]
    assert [one.characters for one in shown] == ["", "", "␣天", "天", "", ""]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a"], "--out"),
        (["--out", "no/such/a.html"], "does not exist"),
        (["--prompt", "a" * 40, "--out", "{folder}/a.html"], "at most the model's context of 16"),
        (["--temperature", "-1", "--out", "a.html"], "temperature is -1"),
        (["--stop", "x", "--out", "a.html"], "--stop"),
        (["--prompt", "a", "--prompt-ids", "1", "--out", "a.html"], "exclude each other"),
    ],
)
def test_mistakes_are_one_line(argv, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a relative --out would be
    done = call("gpt/tour", trained[1], *(word.format(folder=tmp_path) for word in argv))
    assert done.code == 2 and done.err.startswith("error: ") and message in done.err
    assert done.err.count("\n") == 1 and not list(tmp_path.iterdir())
