"""sample.py --score and --check, on nothing but a run's folder."""

import dataclasses
import io
import sys

import jax
import numpy as np
import pytest
from programs import call
from samples import objects, sample

import gpt
from gpt.model import kv_cache
from gpt.sampling import cache_check, engine, language_model


@pytest.fixture(scope="session")
def folder(trained):
    return trained[1]


def step_by_step(model, text):
    """Log-probabilities of a text's tokens, each read through the cache."""
    ids = [model.tokenizer.eot_token, *model.tokenizer.encode_ordinary(text)]
    padded = np.zeros((1, model.config.context_length), np.int32)
    padded[0, 0] = ids[0]
    kv, logits = engine.prefill(model.config, model.params, padded, np.ones(1, np.int32))
    logprobs = []
    for token in ids[1:]:
        logprobs.append(float(jax.nn.log_softmax(logits[0])[token]))
        kv, logits = engine.decode_step(
            model.config, model.params, kv, np.array([token]), np.ones(1, bool)
        )
    return logprobs


def test_a_score_is_the_sum_of_the_steps(folder):
    (score,) = objects(folder, "--score", "the cat sat")
    assert list(score)[:4] == ["tokens", "mean_nll", "bits_per_byte", "perplexity"]
    assert score["tokens"] == len(score["token_ids"]) == len(score["logprobs"]) == 11
    expected = step_by_step(gpt.load(folder), "the cat sat")
    assert np.allclose(score["logprobs"], expected, atol=1e-4)
    assert score["mean_nll"] == pytest.approx(-np.mean(expected), abs=1e-4)
    assert score["perplexity"] == pytest.approx(np.exp(-np.mean(expected)), rel=1e-3)
    assert score["bits_per_byte"] == pytest.approx(-np.sum(expected) / np.log(2) / 11, abs=1e-4)


def test_a_score_as_text_shows_each_token(folder):
    lines = sample(folder, "--score", "a 天").splitlines()
    assert len(lines) == 6 and lines[-1].startswith("5 tokens: ")
    assert [line.split(maxsplit=1)[1] for line in lines[:2]] == ["'a'", "' '"]


def test_the_loss_of_quantizing_is_that_of_one_checkpoint(finished, tmp_path, monkeypatch):
    """A run that is still training saves another while the first is scored."""
    place, kept, honest = finished / "checkpoints" / "12", tmp_path / "12", language_model.load
    place.rename(kept)

    def load(*args, **options):
        model = honest(*args, **options)
        if kept.exists():
            kept.rename(place)
        return model

    monkeypatch.setattr(language_model, "load", load)
    (score,) = objects(finished, "--score", "the cat sat", "--quantize", "int8")
    whole = honest(finished, step=8).score("the cat sat").mean_nll
    assert score["quantization_nll"] == pytest.approx(score["mean_nll"] - whole, abs=1e-6)


def test_the_check_passes_and_a_planted_bug_turns_it_red(folder, monkeypatch):
    assert "the cache contract holds" in sample(folder, "--check")
    honest = kv_cache.KVCache.advanced
    monkeypatch.setattr(kv_cache.KVCache, "advanced", lambda kv, n: honest(kv, n * 0 + n[0]))
    monkeypatch.setattr(cache_check, "CHECKS", (cache_check.check_growth, cache_check.check_ragged))
    # The programs of these weights were compiled without the bug.
    model = gpt.load(folder)
    config = dataclasses.replace(model.config, context_length=15)
    planted = dataclasses.replace(model, config=config)
    monkeypatch.setattr(language_model, "load", lambda *_: planted)
    done = call("sample", folder, "--check")
    assert done.code == 1 and "FAILED ragged rows" in done.out
    assert "ok     growing" in done.out and "1 checks FAILED" in done.out


def test_a_file_of_any_length_is_scored_with_a_stated_stride(folder, tmp_path, monkeypatch):
    text = "the cat sat on the hill\r\n" * 20
    (tmp_path / "text").write_bytes(text.encode())
    (whole,) = objects(folder, "--score-file", tmp_path / "text")
    assert (whole["tokens"], whole["context"], whole["stride"]) == (500, 16, 8)
    (close,) = objects(folder, "--score-file", tmp_path / "text", "--stride", "1")
    assert close["stride"] == 1 and close["mean_nll"] != whole["mean_nll"]
    (small,) = objects(folder, "--score-file", tmp_path / "text", "--window", "8")
    assert (small["context"], small["stride"]) == (8, 4)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    printed = sample(folder, "--score-file", "-", "--stride", "8").splitlines()
    assert len(printed) == 501 and printed[-1].endswith("(context 16, stride 8)")
    assert printed[-1].startswith(f"500 tokens: {whole['mean_nll']:.4f} nats per token")


def test_token_ids_are_scored(folder):
    (text,), (ids,) = (
        objects(folder, "--score", "the"),
        objects(folder, "--score-ids", "116 104 101"),
    )
    assert text == ids
    (other,) = objects(folder, "--score-ids", "256 255")
    assert other["token_ids"] == [256, 255] and other["prefix"] == [256]
    (alone,) = objects(folder, "--score-ids", "256 255", "--prefix", "none")
    assert (alone["token_ids"], alone["prefix"]) == ([255], [256])
    assert alone["logprobs"] == objects(folder, "--score-ids", "255")[0]["logprobs"]
