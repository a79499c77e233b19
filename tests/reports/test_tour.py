"""The tour: what its page shows of a prompt in any script, and what it records of a model."""

import base64
import dataclasses
import json
import math
import re

import byte_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import call, refuse, succeed
from reports.made_up import random_record

from gpt.config import ModelConfig
from gpt.data.tokenizers import CharTokenizer, IdTokenizer
from gpt.errors import UserError
from gpt.model import transformer
from gpt.reports import tour, tour_recorder
from gpt.reports.tour_recorder import record_tour
from gpt.sampling import generate, language_model
from gpt.sampling.settings import Settings


def take(folder, *argv):
    """The page of python -m gpt.tour ARGV, which must succeed."""
    succeed("gpt/tour", *argv, "--out", folder / "tour.html")
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
        out = tmp_path / "b.html"
        done = refuse("came without a tokenizer", "gpt/tour", "run", *argv, "--out", out)
        assert '--prompt-ids "1 2 3"' in done.err and done.err.count("\n") == 1


def test_a_model_of_other_characters_than_the_examples_asks_for_a_prompt(trained, monkeypatch):
    model = dataclasses.replace(language_model.load(trained[1]), tokenizer=CharTokenizer("今天"))
    monkeypatch.setattr(language_model, "load", lambda *_: model)
    done = call("gpt/tour", trained[1])
    assert done.code == 2 and done.err.startswith("error: give a prompt of your own: ")


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


# What the recorder keeps is what the forward pass computed, and what sample.py samples.


MODERN = ModelConfig(
    257, 64, n_layers=2, n_heads=4, n_kv_heads=2, d_model=24, positions="rope", norm="rms",
    mlp="swiglu", qk_norm=True, tied=False,
)  # fmt: skip
POST = ModelConfig(257, 64, n_layers=2, n_heads=1, d_model=16, norm_place="post", d_head=6)
TIED = ModelConfig(257, 8, n_layers=1, n_heads=2, d_model=64, positions="rope")
SETTINGS = Settings(
    max_new_tokens=4, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=3
)
PROMPT = "今天 fish"


@pytest.fixture(scope="module", params=[MODERN, POST], ids=["modern", "post"])
def recorded(request):
    """A model, and the record of a tour."""
    model = byte_models.make_model(request.param, loudness=3)
    return model, record_tour(model, PROMPT, SETTINGS)


@pytest.fixture(scope="module")
def tied():
    return byte_models.make_model(TIED)


def test_recorded_logits_are_those_of_the_forward_pass(recorded):
    """Of prefill and of each decode step, against one pass without a cache; the lens ends there."""
    model, record = recorded
    logits_PV = transformer.forward(model.config, model.params, jnp.array([record.read_ids]))[0]
    recorded_PV = np.concatenate([call.logits_TV for call in record.calls])
    assert np.allclose(recorded_PV, logits_PV, atol=2e-5 * max(1, float(logits_PV.std())))
    probs, ids = jax.lax.top_k(jax.nn.softmax(recorded_PV), tour_recorder.LENS_TOP)
    assert record.lens_layers[-1] == model.config.n_layers
    assert np.allclose(record.lens_probs[-1], probs, atol=1e-4)
    assert np.mean(record.lens_ids[-1] == ids) > 0.95  # near ties may swap


def test_recorded_arrays_fit_together(recorded):
    """Queries and keys give the scores, their masked softmax the weights, and these the output."""
    model, record = recorded
    c = model.config
    k, v = (np.repeat(record.cached(name), c.n_heads // c.kv_heads, axis=1) for name in "kv")
    scores, weights = record.attention_map("scores"), record.attention_map("weights")
    P, T = len(record.read_ids), len(record.prompt_ids)
    is_visible = np.tril(np.ones((P, P), bool))
    dots = np.einsum("LPNH,LNSH->LNPS", record.by_position("q"), k)
    tolerance = 1e-4 * np.abs(dots).max()
    assert np.allclose(scores[..., is_visible], dots[..., is_visible], atol=tolerance)
    # Within the prefill the scores of later keys are kept too, to show what the mask removes.
    assert np.allclose(scores[..., :T, :T], dots[..., :T, :T], atol=tolerance)
    expected = jax.nn.softmax(np.where(is_visible, dots / math.sqrt(c.head_width), -1e30))
    assert np.allclose(weights, expected, atol=1e-5)
    assert np.all(weights[..., ~is_visible] == 0)
    mix = np.einsum("LNPS,LNSH->LPNH", weights, v)
    assert np.allclose(record.by_position("mix"), mix, atol=1e-4 * np.abs(v).max())


def test_it_samples_what_generate_samples(recorded):
    model, record = recorded
    (completion,) = generate.complete(model, [PROMPT], SETTINGS)
    tokens = [sampled.token for sampled in record.sampled]
    assert tokens[: len(completion.token_ids)] == completion.token_ids
    for sampled in record.sampled:
        probs = list(sampled.stages.values())[-1]
        low = probs[: sampled.token].sum(dtype=np.float64)
        assert low - 1e-5 <= sampled.uniform <= low + probs[sampled.token] + 1e-5
        assert list(sampled.stages) == ["the model", "penalty", "temperature", "top-k", "top-p"]
        assert np.count_nonzero(sampled.stages["top-k"]) <= 40
        assert all(math.isclose(p.sum(), 1, abs_tol=1e-5) for p in sampled.stages.values())


def test_a_tied_embedding_predicts_the_token_itself(tied):
    record = record_tour(tied, "abcdef", Settings(max_new_tokens=1, temperature=0))
    assert record.lens_layers[0] == 0
    assert record.lens_ids[0][:, 0].tolist() == record.read_ids
    assert record.sampled[0].uniform is None
    assert list(record.sampled[0].stages) == ["the model"]


def test_what_does_not_fit_is_refused(tied):
    with pytest.raises(UserError, match="9 tokens: expected at most the model's context of 8"):
        record_tour(tied, "a" * 9, SETTINGS)
    large = ModelConfig(257, 2048, n_layers=12, n_heads=12, d_model=768)
    tour_recorder.require_page_size(large, 64)
    with pytest.raises(UserError, match=r"200 positions of this model would have 45\.5 MB"):
        tour_recorder.require_page_size(large, 200)
