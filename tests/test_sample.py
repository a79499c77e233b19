"""sample.py: completions and streams, from nothing but a run's folder."""

import io
import random
import sys

import jax
import numpy as np
import pytest
from programs import SHAPE, call, snapshot
from samples import BRIEF, TWO, objects, sample

import gpt
from gpt.model import transformer

FIELDS = ["prompt", "text", "token_ids", "logprobs", "finish_reason", "prefill_seconds"]
FIELDS += ["decode_seconds", "tokens_per_second", "seed", "sample"]
VERSES = """床前明月光，疑是地上霜。举头望明月，低头思故乡。
春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。
白日依山尽，黄河入海流。欲穷千里目，更上一层楼。
红豆生南国，春来发几枝。愿君多采撷，此物最相思。
千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。""".splitlines()


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
    assert "compilation is left out" in done["timing"] and "start-up" in done["timing"]
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
    type_in(b"the \n" + b"x" * 20 + b"\na cat", monkeypatch)
    done = call("sample", folder, "--interactive", *BRIEF)
    first, last = (sample(folder, "--prompt", text, *BRIEF) for text in ("the ", "a cat"))
    assert (done.code, done.out) == (0, f"{first}\n{last}")
    assert done.err.count("error: ") == 1 and "20 tokens, which exceeds" in done.err


UNUSABLE = {"--logit-bias": ["257", "1"], "--show-probs": ["258"]}


@pytest.mark.parametrize("flag", UNUSABLE)
def test_what_no_line_could_be_completed_with_is_refused_before_the_first(
    flag, folder, monkeypatch
):
    """Once, not for each line; which settings a model can use is known when it is loaded."""
    type_in(b"the \na cat\n", monkeypatch)
    done = call("sample", folder, "--interactive", flag, *UNUSABLE[flag])
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    said = {"--logit-bias": "logit_bias names token 257", "--show-probs": "show_probs is 258"}
    assert done.err.startswith(f"error: {said[flag]}: expected 0 to 25")


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
