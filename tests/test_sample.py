"""sample.py: completions and streams, from nothing but a run's folder."""

import io
import sys

import jax
import numpy as np
import pytest
from programs import call, snapshot
from samples import BRIEF, TWO, objects, sample

import gpt
from gpt.model import transformer

FIELDS = ["prompt", "text", "token_ids", "logprobs", "finish_reason", "prefill_seconds"]
FIELDS += ["decode_seconds", "tokens_per_second", "seed", "sample"]


@pytest.fixture(scope="session")
def folder(trained):
    return trained[1]


# Completions.


def test_two_prompts_and_two_samples_are_four_completions(folder):
    """And nothing on disk has changed."""
    argv = [*TWO, "--num-samples", "2", *BRIEF]
    before = snapshot(folder)
    printed = sample(folder, *argv)
    assert snapshot(folder) == before
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


def test_json_has_the_fields_that_others_read(folder):
    (done,) = objects(folder, "--prompt", "the ", *BRIEF, "--seed", "3")
    assert list(done)[: len(FIELDS)] == FIELDS
    assert done["seed"] == 3 and done["sample"] == 0
    assert "compilation is left out" in done["timing"] and "start-up" in done["timing"]
    assert done["finish_reason"] in ("length", "eos")
    assert len(done["token_ids"]) == len(done["logprobs"]) <= 12
    assert all(p < 0 for p in done["logprobs"])
    assert done["prefill_seconds"] > 0 and done["decode_seconds"] > 0
    rate = (len(done["token_ids"]) - 1) / done["decode_seconds"]
    assert done["tokens_per_second"] == pytest.approx(rate)
    printed = call("sample", folder, "--prompt", "the ", *BRIEF, "--seed", "3")
    assert printed.out == "the " + done["text"] + "\n"
    assert "prefill" in printed.err and "compilation left out" in printed.err


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


# Prompts.


def type_in(content, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_prompts_as_token_ids(folder):
    """Equal to the text that they spell, and any id of the vocabulary is one."""
    (text,) = objects(folder, "--prompt", "the ", *BRIEF)
    argv = ["--prompt-ids", "116 104 101 32", "--prompt-ids", "256 255", *BRIEF]
    same, other = objects(folder, *argv)
    assert (same["prompt"], same["token_ids"]) == ("the ", text["token_ids"])
    assert other["prompt"] == "<|endoftext|>\ufffd" and other["token_ids"]
    (empty,), (none,) = objects(folder, "--prompt-ids", "", *BRIEF), objects(folder, *BRIEF)
    assert empty["token_ids"] == none["token_ids"]


def test_a_prompt_from_a_file_or_a_pipe(folder, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_text("the \n")
    expected = sample(folder, "--prompt", "the \n", *BRIEF)
    assert sample(folder, "--prompt-file", tmp_path / "prompt", *BRIEF) == expected
    type_in(b"the \n", monkeypatch)
    assert sample(folder, "--prompt-file", "-", *BRIEF) == expected


def test_bytes_that_are_no_text_are_replaced(folder, tmp_path):
    """Of a file with a note. On a command line Python gives each as half of a surrogate pair."""
    (tmp_path / "file").write_bytes(b"a\xe5\xa4")
    done = call("sample", folder, "--prompt-file", tmp_path / "file", *BRIEF)
    assert done.out == sample(folder, "--prompt", "a\ufffd", *BRIEF)
    assert "is not valid UTF-8: what cannot be decoded is read as U+FFFD" in done.err
    typed = sample(folder, "--prompt", "a\udce5", *BRIEF)
    assert typed == sample(folder, "--prompt", "a\ufffd", *BRIEF)


def test_each_line_of_a_pipe_is_a_prompt_of_its_own(folder, monkeypatch):
    type_in(b"the \n" + b"x" * 20 + b"\na cat\nthe ", monkeypatch)
    done = call("sample", folder, "--interactive", *BRIEF)
    lines = [("the ", "0"), ("a cat", "2"), ("the ", "3")]  # each with a seed of its own
    texts = [sample(folder, "--prompt", text, *BRIEF, "--seed", seed) for text, seed in lines]
    assert (done.code, done.out) == (0, f"{texts[0]}\n{texts[1]}{texts[2]}")
    assert texts[0] != texts[2]
    assert done.err.count("error: ") == 1 and "20 tokens, which exceeds" in done.err


def test_what_no_line_could_be_completed_with_is_refused_before_the_first(folder, monkeypatch):
    """Once, not for each line; which settings a model can use is known when it is loaded."""
    type_in(b"the \na cat\n", monkeypatch)
    done = call("sample", folder, "--interactive", "--logit-bias", "257", "1")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: logit_bias names token 257: expected 0 to 256")
