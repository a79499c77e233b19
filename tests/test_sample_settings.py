"""sample.py: every setting reaches the model, and every report is there when asked for."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from programs import call, program
from samples import BRIEF, TWO, objects, sample

import gpt
from gpt.sampling import generate
from gpt.sampling.completion import Completion, Piece


@pytest.fixture(scope="session")
def folder(trained):
    return trained[1]


# Settings.


def tokens(folder, *argv):
    return [done["token_ids"] for done in objects(folder, "--prompt", "the ", *BRIEF, *argv)]


def test_every_filter_reaches_the_draw(folder):
    greedy = tokens(folder, "--temperature", "0")
    assert tokens(folder, "--top-p", "1e-6") == tokens(folder, "--min-p", "1") == greedy
    assert tokens(folder, "--temperature", "0", "--repetition-penalty", "9") != greedy
    biased = ["--logit-bias", "65", "200", "--logit-bias", "66", "-5"]
    assert tokens(folder, *biased) == [[65] * 12]


def test_end_of_text_can_be_forbidden(folder):
    bias = ["--logit-bias", "256", "200"]
    (done,) = objects(folder, "--prompt", "the ", *BRIEF, *bias)
    assert (done["text"], done["finish_reason"]) == ("", "eos")
    (done,) = objects(folder, "--prompt", "the ", *BRIEF, *bias, "--ignore-eos")
    assert len(done["token_ids"]) == 12 and 256 not in done["token_ids"]


def test_stop_strings_end_the_text_and_are_not_printed(folder):
    letters = ["--logit-bias", "65", "200"]
    argv = ["--prompt", "the ", *BRIEF, *letters]
    (done,) = objects(folder, *argv, "--stop", "b", "--stop", "AAAA", "--stop=--x")
    assert (done["text"], done["finish_reason"]) == ("", "stop")
    stopped = call("sample", folder, *argv, "--stop", "AAAA")
    assert stopped.out == "the \n" and "stopped by stop" in stopped.err


def test_a_full_context_as_the_user_wants_it(folder):
    argv = ["--prompt", "the ", "--max-new-tokens", "40", "--ignore-eos"]
    stopped = call("sample", folder, *argv)
    assert "context of 16 tokens is full, --on-context-full slide goes on" in stopped.err
    slid = call("sample", folder, *argv, "--on-context-full", "slide")
    assert slid.code == 0 and slid.out.startswith(stopped.out.rstrip("\n"))
    assert "stopped by length" in slid.err
    failed = call("sample", folder, *argv, "--on-context-full", "error")
    assert failed.code == 2 and failed.err.startswith("error: the context of 16 tokens is full")


# Several rows on one output.


def test_each_line_of_json_is_printed_when_its_row_has_ended(folder, monkeypatch):
    """In the order of the rows, although the last end first."""
    counts, honest = [], generate.stream

    def watched(model, prompts, settings, **options):
        each = [dataclasses.replace(settings, max_new_tokens=n) for n in (3, 7, 5)]
        for piece in honest(model, prompts, each, **options, chunk=1):
            yield piece
            counts.append((len(piece.completion.token_ids), sys.stdout.getvalue().count("\n")))

    monkeypatch.setattr(generate, "stream", watched)
    prompts = [*TWO, "--prompt", "x", "--ignore-eos"]
    done = objects(folder, *prompts)
    assert [d["prompt"] for d in done] == ["the ", "a cat", "x"]
    assert [len(d["token_ids"]) for d in done] == [3, 7, 5]
    lines = dict(counts)  # after so many tokens, so many lines
    assert (lines[2], lines[4], lines[6], lines[7]) == (0, 1, 1, 3)


def test_ctrl_c_in_a_conversation_keeps_samples_that_have_ended(monkeypatch, capsys):
    """The second has ended, and waits for the first, which is in the middle of a line."""
    first, second = (Completion("the ", [], 0, 0, finish_reason=reason) for reason in (None, "eos"))
    pieces = [Piece(0, "one", first), Piece(1, "two", second)]
    monkeypatch.setattr(generate, "stream", lambda *_, **__: iter(pieces))
    sample_py = program("sample")
    args = sample_py.Args(Path("run"), settings=gpt.Settings(num_samples=2))
    model = SimpleNamespace(tokenizer=None, config=gpt.ModelConfig())
    pressed = iter([False, True])
    sample_py.generate(model, args, ["the "], lambda: next(pressed))
    label = "--- prompt 1, sample {} ---\nthe {}\n"
    shown = capsys.readouterr()
    assert shown.out == label.format(1, "one") + label.format(2, "two\n")
    assert shown.err.endswith("stopped by Ctrl-C, eos\n")


# Probabilities, beams, programs.


def test_the_likeliest_tokens_of_each_step(folder):
    argv = ["--prompt", "the ", *BRIEF]
    (done,) = objects(folder, *argv, "--show-probs", "257")
    assert len(done["top"]) == len(done["token_ids"])
    for token, logprob, top in zip(done["token_ids"], done["logprobs"], done["top"], strict=True):
        probabilities = [p for _, p in top]
        assert sorted(probabilities, reverse=True) == probabilities
        assert sum(probabilities) == pytest.approx(1, abs=1e-4) and len(dict(top)) == 257
        assert dict(top)[token] == pytest.approx(np.exp(logprob), rel=1e-3)
    printed = sample(folder, *argv, "--show-probs", "257")
    assert printed.startswith("after prefill\n") and printed.endswith("the " + done["text"] + "\n")
    table = printed[: -len("the " + done["text"] + "\n")].splitlines()
    assert sum(line.startswith("  * ") for line in table) == len(done["token_ids"])
    assert sum(line.startswith("step ") for line in table) == len(done["token_ids"]) - 1
    assert "top" not in objects(folder, *argv)[0]


def test_a_drawn_end_of_text_is_shown_too(folder):
    argv = ["--prompt", "the ", *BRIEF, "--logit-bias", "256", "200", "--show-probs"]
    (done,) = objects(folder, *argv, "257")
    assert (done["token_ids"], len(done["top"])) == ([], 1)
    shown = sample(folder, *argv, "257").splitlines()
    (drawn,) = [line for line in shown if line.startswith("  * ")]
    assert f"{dict(done['top'][0])[256]:.4%}" in drawn and drawn.endswith("'<|endoftext|>'")
    few = sample(folder, *argv, "1").splitlines()  # its probability is below the one that is kept
    assert few[2].startswith("  * <=") and few[1].split()[0] in few[2]


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
    short = objects(folder, *argv, "--length-penalty", "-5")
    assert short[0]["score"] != done[0]["score"]
    exact = objects(folder, *argv, "--early-stopping", "never")
    early = objects(folder, *argv, "--early-stopping", "True")
    assert exact[0]["score"] >= done[0]["score"] >= early[0]["score"]
    alone = sample(folder, "--prompt", "the ", *BRIEF, "--beam-width", "4")
    assert alone == "the " + done[0]["text"] + "\n"


def test_beams_are_not_told_to_slide(folder):
    """Which they cannot: neither when the context is full nor when the prompt is too long."""
    argv = ["--prompt", "the ", "--ignore-eos", "--beam-width", "2"]
    full = call("sample", folder, *argv)
    assert full.err.endswith("stopped by context: the model's context of 16 tokens is full\n")
    long = call("sample", folder, "--prompt", "x" * 17, "--beam-width", "2")
    assert long.code == 2 and long.err.endswith("the model's context of 16: shorten it\n")


def listed(err, name, sizes):
    return any(line.startswith(f"compiled {name} ({sizes}) in ") for line in err.splitlines())


def test_programs_are_listed_with_their_shapes_where_asked_for(folder):
    """Those that this very process has compiled: no other test has five rows, nor a top of 7."""
    argv = ["--prompt", "the ", "--num-samples", "5", "--max-new-tokens", "40", "--verbose"]
    done = call("sample", folder, *argv, "--show-probs", "7")
    assert listed(done.err, "sample_first", "batch 5, top 7")
    assert listed(done.err, "decode_chunk", "batch 5, capacity 16, top 7")
    assert not listed(done.err, "decode_chunk", "batch 5, capacity 16")
    assert listed(done.err, "prefill", "batch 1, bucket 16")
    assert done.err.splitlines()[-1].endswith("from the cache")
    slid = call("sample", folder, *argv, "--on-context-full", "slide", "--ignore-eos")
    assert listed(slid.err, "reread", "batch 5, bucket 16, capacity 16")
    assert listed(slid.err, "decode_chunk", "batch 5, capacity 16")
    beams = call("sample", folder, "--beam-width", "7", "--verbose")
    assert listed(beams.err, "search_chunk", "prompts 1, width 7, capacity 16")
    score = call("sample", folder, "--score", "the", "--verbose")
    assert listed(score.err, "target_logprobs", "batch 1, bucket 16")
    assert "compiled" not in call("sample", folder, *argv[:-1]).err.replace("compilation", "")
