"""sample.py: completions, streams, scores and checks, from nothing but a run's folder."""

import json
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
from programs import ROOT, SHAPE, call, snapshot

import gpt
from gpt.model import cache, transformer
from gpt.sampling import check, engine

FIELDS = ["prompt", "text", "token_ids", "logprobs", "finish_reason", "prefill_seconds"]
FIELDS += ["decode_seconds", "tokens_per_second", "seed", "sample"]
BRIEF = ["--max-new-tokens", "12"]
TWO = ["--prompt", "the ", "--prompt", "a cat"]
VERSES = """床前明月光，疑是地上霜。举头望明月，低头思故乡。
春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。
白日依山尽，黄河入海流。欲穷千里目，更上一层楼。
红豆生南国，春来发几枝。愿君多采撷，此物最相思。
千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。""".splitlines()


def sample(folder, *argv):
    """What sample.py prints, which must go well."""
    done = call("sample", folder, *argv)
    assert done.code == 0, done.err
    return done.out


def objects(folder, *argv):
    """What it prints with --json."""
    return [json.loads(line) for line in sample(folder, *argv, "--json").splitlines()]


@pytest.fixture(scope="session")
def folder(trained):
    return trained[1]


# Completions.


def test_two_prompts_and_two_samples_are_four_completions(folder):
    argv = [*TWO, "--num-samples", "2", *BRIEF]
    printed = sample(folder, *argv)
    labels = [f"--- prompt {p}, sample {s} ---\n{t}" for p, t in ((1, "the "), (2, "a cat"))
              for s in (1, 2)]  # fmt: skip
    assert all(printed.count(label) == 1 for label in labels)
    assert sample(folder, *argv) == printed
    assert sample(folder, *argv, "--seed", "1") != printed
    done = objects(folder, *argv)
    assert [(d["prompt"], d["sample"]) for d in done] == [
        ("the ", 0), ("the ", 1), ("a cat", 0), ("a cat", 1)
    ]  # fmt: skip
    assert len({tuple(d["token_ids"]) for d in done}) == 4
    assert all(d["prompt"] + d["text"] in printed for d in done)


def test_a_completion_does_not_depend_on_its_neighbours(folder):
    together = objects(folder, *TWO, "--num-samples", "2", *BRIEF)
    alone = objects(folder, "--prompt", "a cat", *BRIEF)
    assert alone[0]["token_ids"] == together[2]["token_ids"]


def test_json_has_the_fields_that_others_read(folder):
    (done,) = objects(folder, "--prompt", "the ", *BRIEF, "--seed", "3")
    assert list(done)[: len(FIELDS)] == FIELDS
    assert done["seed"] == 3 and done["sample"] == 0
    assert done["finish_reason"] in ("length", "eos")
    assert len(done["token_ids"]) == len(done["logprobs"]) <= 12
    assert all(p < 0 for p in done["logprobs"])
    assert done["prefill_seconds"] > 0 and done["decode_seconds"] > 0
    rate = (len(done["token_ids"]) - 1) / done["decode_seconds"]
    assert done["tokens_per_second"] == pytest.approx(rate)


def test_one_completion_streams_after_its_prompt(folder):
    (done,) = objects(folder, "--prompt", "the ", *BRIEF)
    assert sample(folder, "--prompt", "the ", *BRIEF) == "the " + done["text"] + "\n"


def test_speed_and_notes_stay_out_of_standard_output(folder):
    done = call("sample", folder, "--prompt", "the ", *BRIEF)
    assert "prefill" in done.err and "compilation left out" in done.err
    assert "prefill" not in done.out


def test_without_a_prompt_generation_starts_from_end_of_text(folder):
    model = gpt.load(folder)
    (done,) = objects(folder, *BRIEF)
    assert done["prompt"] == "" and done["token_ids"]
    eot = np.array([[model.tokenizer.eot_token]])
    logits = transformer.forward(model.config, model.params, eot)[0, -1]
    expected = jax.nn.log_softmax(logits)[done["token_ids"][0]]
    assert done["logprobs"][0] == pytest.approx(float(expected), abs=1e-4)


def test_temperature_zero_is_greedy(folder):
    argv = [*TWO, "--temperature", "0", *BRIEF]
    first, other = (objects(folder, *argv, "--seed", seed) for seed in "12")
    assert [d["token_ids"] for d in first] == [d["token_ids"] for d in other]
    hot = objects(folder, *TWO, "--temperature", "5", *BRIEF)
    assert [d["token_ids"] for d in hot] != [d["token_ids"] for d in first]
    assert objects(folder, *TWO, "--top-k", "1", *BRIEF)[0]["token_ids"] == first[0]["token_ids"]


def test_a_full_context_ends_a_completion(folder):
    done = objects(folder, "--prompt", "the cat", "--max-new-tokens", "100", "--num-samples", "4")
    full = [d for d in done if d["finish_reason"] == "context"]
    assert full and all(d["finish_reason"] in ("context", "eos") for d in done)
    for d in full:  # 16 positions, and one token drawn from the last
        assert len(d["token_ids"]) == 16 - len("the cat") + 1


def test_another_step_can_be_chosen(folder):
    new, old = (objects(folder, "--prompt", "a", *BRIEF, "--step", s)[0] for s in ("12", "8"))
    assert objects(folder, "--prompt", "a", *BRIEF)[0]["logprobs"] == new["logprobs"]
    assert new["logprobs"] != old["logprobs"]


def test_sampling_changes_nothing_on_disk(folder):
    before = snapshot(folder)
    sample(folder, *TWO, *BRIEF)
    assert snapshot(folder) == before


# Scores and checks.


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


def test_the_check_passes_and_a_planted_bug_turns_it_red(folder, monkeypatch):
    assert "the cache contract holds" in sample(folder, "--check")
    honest = cache.KVCache.advanced
    monkeypatch.setattr(cache.KVCache, "advanced", lambda kv, n: honest(kv, n * 0 + n[0]))
    monkeypatch.setattr(check, "CHECKS", (check.check_growth, check.check_ragged))
    jax.clear_caches()
    try:
        done = call("sample", folder, "--check")
    finally:
        jax.clear_caches()
    assert done.code == 1 and "FAILED ragged rows" in done.out
    assert "ok     growing" in done.out and "1 checks FAILED" in done.out


# Whole characters.


@pytest.fixture(scope="session")
def chinese(tmp_path_factory):
    """A run on Chinese text with a BPE too small for the characters of the prompt."""
    place = tmp_path_factory.mktemp("chinese")
    lines = random.Random(0).choices(VERSES, k=300)
    (place / "verses.txt").write_text("\n".join(lines), encoding="utf-8")
    argv = [*SHAPE, "--tokenizer", "bpe", "--vocab-size", "280", "--steps", "2"]
    argv += ["--seq-len", "64", "--sample-every", "0", "--data", place / "verses.txt"]
    done = call("train", *argv, "--out", place / "run")
    assert done.code == 0, done.err
    return place / "run"


def test_streamed_text_never_shows_half_a_character(chinese):
    """A model that knows next to nothing breaks characters all the time."""
    model = gpt.load(chinese)
    assert model.tokenizer.name == "bpe"
    broken = rejoined = 0
    settings = {"max_new_tokens": 60, "num_samples": 8, "top_k": 60, "temperature": 1.2}
    pieces = {}
    for piece in model.stream("今天的天气很", **settings):
        pieces.setdefault(piece.row, []).append(piece.text)
        last = piece.completion
    assert len(pieces) == 8 and last
    for row, done in enumerate(model.generate("今天的天气很", **settings)):
        whole = model.tokenizer.decode_bytes(done.token_ids).decode("utf-8", "replace")
        apart = "".join(
            model.tokenizer.decode_bytes([i]).decode("utf-8", "replace") for i in done.token_ids
        )
        assert "".join(pieces[row]) == done.text == whole
        broken += apart.count("\ufffd") > whole.count("\ufffd")
        rejoined += sum("\u4e00" <= c <= "\u9fff" for c in whole)
    assert broken and rejoined  # or nothing has been shown


def test_sample_py_prints_whole_characters(chinese):
    printed = sample(chinese, "--prompt", "今天的天气很", "--max-new-tokens", "40")
    (done,) = objects(chinese, "--prompt", "今天的天气很", "--max-new-tokens", "40")
    assert printed == "今天的天气很" + done["text"] + "\n"


# What is refused.


def cut_metadata(folder):
    """A run whose one checkpoint has lost half of its description."""
    path = folder / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    path.parent.mkdir(parents=True)
    path.write_text('{"metadata": {"mod')
    return folder


BAD = {
    "a missing folder": (["gone"], "no folder gone"),
    "an empty folder": (["void"], "no checkpoint in void"),
    "a half-written checkpoint": (["half"], "no checkpoint in half"),
    "a damaged checkpoint": (["cut"], "is whole: "),
    "a step that is not there": (["RUN", "--step", "5"], "it has [8, 12]"),
    "a long prompt": (["RUN", "--prompt", "x" * 17], "17 tokens: expected at most"),
    "nothing to score": (["RUN", "--score", ""], "nothing to score"),
    "two wishes": (["RUN", "--score", "x", "--check"], "exclude each other"),
    "a negative number": (["RUN", "--max-new-tokens", "-1"], "max_new_tokens is -1"),
    "NaN": (["RUN", "--temperature", "nan"], "temperature is nan"),
    "no samples": (["RUN", "--num-samples", "0"], "num_samples is 0"),
    "an unknown flag": (["RUN", "--promt", "x"], "--promt"),
    "no checkpoint named": ([], "CHECKPOINT"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error(case, folder, tmp_path, monkeypatch):
    argv, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "void").mkdir()
    (tmp_path / "half" / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir(parents=True)
    cut_metadata(tmp_path / "cut")
    before = snapshot(tmp_path)
    done = call("sample", *[folder if word == "RUN" else word for word in argv])
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and words in done.err
    assert snapshot(tmp_path) == before


def test_bytes_that_are_no_text_are_replaced(folder):
    """As a shell may hand them over: Python gives each as half of a surrogate pair."""
    assert sample(folder, "--prompt", "a\udcff", *BRIEF).startswith("a\ufffd")
    assert objects(folder, "--prompt", "a\udcff", *BRIEF)[0]["prompt"] == "a\ufffd"


def test_a_real_process_refuses_in_one_line():
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "gone"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no folder gone") and done.stderr.count("\n") == 1
