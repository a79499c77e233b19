"""sample.py on nothing but a run's folder: completions, settings, beams, scores, checks."""

import io
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from programs import call, objects, program, sample, snapshot

import gpt
from gpt import sample_flags, terminal
from gpt.sampling import cache_check, language_model
from gpt.sampling.completion import Completion, Piece

BRIEF = ["--max-new-tokens", "12"]
TWO = ["--prompt", "the ", "--prompt", "a cat"]
FIELDS = ["prompt", "text", "token_ids", "logprobs", "finish_reason", "prefill_seconds"]
FIELDS += ["decode_seconds", "tokens_per_second", "seed", "sample", "proposed", "accepted"]


# Completions.


def test_two_prompts_and_two_samples_are_four_completions(folder):
    """And nothing on disk has changed."""
    argv = [*TWO, "--num-samples", "2", *BRIEF]
    before = snapshot(folder)
    printed = sample(folder, *argv)
    assert snapshot(folder) == before
    done = objects(folder, *argv)
    assert printed == "".join(
        f"--- prompt {1 + i // 2}, sample {1 + i % 2} ---\n{d['prompt']}{d['text']}\n\n"
        for i, d in enumerate(done)
    )
    assert [(d["prompt"], d["sample"]) for d in done] == [*product(("the ", "a cat"), (0, 1))]
    assert len({tuple(d["token_ids"]) for d in done}) == 4
    assert sample(folder, *argv, "--seed", "1") != printed


def test_speculation_gives_the_same_text(folder):
    """Looked up, and by a draft, which is the model itself."""
    argv = ["--prompt", "the cat the cat", "--temperature", "0", "--max-new-tokens", "60"]
    (plain,) = objects(folder, *argv)
    for more in ((), ("--draft", folder)):
        (done,) = objects(folder, *argv, "--speculate", "2", *more)
        assert done["token_ids"] == plain["token_ids"]


def test_json_has_the_fields_that_others_read(folder):
    argv = ["--prompt", "the ", *BRIEF, "--seed", "3"]
    (done,) = objects(folder, *argv)
    assert list(done) == [*FIELDS, "timing"]
    assert (done["seed"], done["sample"], done["proposed"], done["accepted"]) == (3, 0, 0, 0)
    assert "compilation is left out" in done["timing"] and "start-up" in done["timing"]
    assert done["finish_reason"] in ("length", "eos")
    assert len(done["token_ids"]) == len(done["logprobs"]) <= 12
    assert done["prefill_seconds"] > 0 and done["decode_seconds"] > 0
    rate = (len(done["token_ids"]) - 1) / done["decode_seconds"]
    assert done["tokens_per_second"] == pytest.approx(rate)
    printed = call("sample", folder, *argv)
    assert printed.out == "the " + done["text"] + "\n"
    assert "prefill" in printed.err and "compilation excluded" in printed.err


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


def test_each_line_of_a_pipe_is_a_prompt_of_its_own(folder, monkeypatch):
    """The same line gives another sample each time."""
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


# Settings.


def tokens(folder, *argv):
    return [done["token_ids"] for done in objects(folder, "--prompt", "the ", *BRIEF, *argv)]


def test_every_filter_reaches_the_draw(folder):
    greedy = tokens(folder, "--temperature", "0")
    for flags in (("--top-p", "1e-6"), ("--min-p", "1"), ("--top-k", "1")):
        assert tokens(folder, *flags) == greedy
    assert tokens(folder, "--temperature", "0", "--repetition-penalty", "9") != greedy
    biased = ["--logit-bias", "65", "200", "--logit-bias", "66", "-5"]
    assert tokens(folder, *biased) == [[65] * 12]


def test_stop_strings_end_the_text_and_are_not_printed(folder):
    letters = ["--logit-bias", "65", "200"]
    argv = ["--prompt", "the ", *BRIEF, *letters]
    (done,) = objects(folder, *argv, "--stop", "b", "--stop", "AAAA", "--stop=--x")
    assert (done["text"], done["finish_reason"]) == ("", "stop")
    stopped = call("sample", folder, *argv, "--stop", "AAAA")
    assert stopped.out == "the \n" and "stopped by stop" in stopped.err


def test_a_full_context_as_the_user_wants_it(folder):
    argv = ["--prompt", "the ", "--max-new-tokens", "40", "--ignore-eos"]
    stopped = call("sample", folder, *argv, "--on-context-full", "stop")
    assert "context of 16 tokens is full" in stopped.err
    slid = call("sample", folder, *argv)
    assert slid.code == 0 and slid.out.startswith(stopped.out.rstrip("\n"))
    assert "stopped by length" in slid.err and "use --on-context-full stop to end there" in slid.err
    failed = call("sample", folder, *argv, "--on-context-full", "error")
    assert failed.code == 2 and failed.err.startswith("error: the context of 16 tokens is full")


# Several rows on one output.


def test_ctrl_c_in_a_conversation_keeps_samples_that_have_ended(capsys):
    """The second has ended, and waits for the first, which is in the middle of a line."""
    first, second = (Completion("the ", [], 0, 0, finish_reason=reason) for reason in (None, "eos"))
    pieces = [Piece(0, "one", first), Piece(1, "two", second)]
    args = sample_flags.Args(Path("run"), settings=gpt.Settings(num_samples=2))
    model = SimpleNamespace(tokenizer=None, config=gpt.ModelConfig())
    pressed = iter([False, True])
    program("sample").show(pieces, model, args, 1, lambda: next(pressed))
    label = "--- prompt 1, sample {} ---\nthe {}\n"
    shown = capsys.readouterr()
    assert shown.out == label.format(1, "one") + label.format(2, "two\n")
    assert shown.err.endswith("stopped by Ctrl-C, eos\n")


# Probabilities, beams, programs.


def test_the_likeliest_tokens_of_each_step(folder):
    argv = ["--prompt", "the ", *BRIEF, "--show-probs", "257"]
    (done,) = objects(folder, *argv)
    for token, logprob, top in zip(done["token_ids"], done["logprobs"], done["top"], strict=True):
        probabilities = [p for _, p in top]
        assert sorted(probabilities, reverse=True) == probabilities and len(dict(top)) == 257
        assert dict(top)[token] == pytest.approx(np.exp(logprob), rel=1e-3)
    text = "the " + done["text"] + "\n"
    printed = sample(folder, *argv)
    assert printed.startswith("after prefill\n") and printed.endswith(text)
    assert printed.removesuffix(text).count("\n  * ") == len(done["token_ids"])


def test_beams_are_the_best_texts_with_their_scores(folder):
    argv = [*TWO, *BRIEF, "--beam-width", "4", "--num-samples", "2", "--temperature", "0"]
    done = objects(folder, *argv)
    assert [d["sample"] for d in done] == [0, 1, 0, 1] and list(done[0])[-1] == "score"
    assert done[0]["score"] >= done[1]["score"] and done[0]["text"] != done[1]["text"]
    printed = sample(folder, *argv)
    assert printed == "".join(
        f"--- prompt {1 + i // 2}, sample {1 + i % 2}, score {d['score']:.4f} ---\n"
        f"{d['prompt']}{d['text']}\n\n"
        for i, d in enumerate(done)
    )
    short = objects(folder, *argv, "--length-penalty", "-5", "--early-stopping", "never")
    assert short[0]["score"] != done[0]["score"]


def test_programs_are_listed_with_their_shapes_where_asked_for(folder):
    """Those that this very process has compiled: no other test has five rows, nor a top of 7."""
    argv = ["--prompt", "the ", "--num-samples", "5", "--max-new-tokens", "9"]
    done = call("sample", folder, *argv, "--verbose", "--show-probs", "7")
    lines = done.err.splitlines()
    for program_and_sizes in (
        "sample_first (batch 5, top 7)",
        "prefill (batch 1, bucket 16)",
        "decode_chunk (batch 5, capacity 16, top 7)",
    ):
        assert any(line.startswith(f"compiled {program_and_sizes} in ") for line in lines)
    assert lines[-1].endswith("from the cache")
    assert "compiled" not in call("sample", folder, *argv).err.replace("compilation", "")


# Scores and checks.


def test_a_score_has_the_fields_that_others_read(folder):
    (score,) = objects(folder, "--score", "the cat sat")
    assert list(score)[:4] == ["tokens", "mean_nll", "bits_per_byte", "perplexity"]
    assert score == gpt.load(folder).score("the cat sat").to_json()
    assert score["tokens"] == len(score["token_ids"]) == len(score["logprobs"]) == 11
    lines = sample(folder, "--score", "a 天").splitlines()  # as text it shows each token
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


def test_a_file_of_any_length_is_scored_with_a_stated_stride(folder, tmp_path, monkeypatch):
    text = "the cat sat on the hill\r\n" * 20
    (tmp_path / "text").write_bytes(text.encode())
    flags = {(): (16, 8), ("--stride", "1"): (16, 1), ("--window", "8"): (8, 4)}
    for more, (context, stride) in flags.items():
        (score,) = objects(folder, "--score-file", tmp_path / "text", *more)
        assert (score["tokens"], score["context"], score["stride"]) == (500, context, stride)
    type_in(text.encode(), monkeypatch)
    monkeypatch.setattr(terminal, "SHOWN_TOKENS", 3)
    printed = sample(folder, "--score-file", "-").splitlines()
    assert len(printed) == 5 and printed[3].startswith("... and 497 more tokens")
    assert printed[-1].startswith("500 tokens: ") and printed[-1].endswith("stride 8)")


def test_token_ids_are_scored(folder):
    assert objects(folder, "--score-ids", "116 104 101") == objects(folder, "--score", "the")
    (after_eot,) = objects(folder, "--score-ids", "255")
    (alone,) = objects(folder, "--score-ids", "256 255", "--prefix", "none")
    assert (alone["token_ids"], alone["prefix"]) == ([255], [256])
    assert alone["logprobs"] == after_eot["logprobs"]


@pytest.mark.parametrize(("difference", "code"), [(0.0, 0), (2.0, 1)])
def test_the_check_tells_each_result_and_whether_all_passed(folder, difference, code, monkeypatch):
    """Results made up; tests/sampling/test_cache_check.py has the real ones."""
    results = [cache_check.Check("growing", 0.0, 1.0), cache_check.Check("rows", difference, 1.0)]
    monkeypatch.setattr(cache_check, "run_checks", lambda model: results)
    done = call("sample", folder, "--check")
    said = {0: ("ok     rows", "the cache contract holds"), 1: ("FAILED rows", "1 check FAILED")}
    assert done.code == code and "ok     growing" in done.out
    assert all(words in done.out for words in said[code])
