"""sample.py: bad input is one error, told before anything is printed or changed."""

import pytest
from programs import call, snapshot


@pytest.fixture(scope="session")
def folder(trained):
    return trained[1]


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
    "a negative number": (["RUN", "--max-new-tokens", "-1"], "--max-new-tokens is -1: exp"),
    "infinity": (
        ["RUN", "--temperature", "inf"],
        "is inf: expected zero or more, and finite",
    ),
    "a negative k": (["RUN", "--top_k", "-1"], "--top-k is -1: expected"),
    "NaN": (
        ["RUN", "--temperature", "nan"],
        "--temperature is nan: expected",
    ),
    "no samples": (["RUN", "--num-samples", "0"], "--num-samples is 0"),
    "a token out of range": (["RUN", "--prompt-ids", "1 257"], "257"),
    "words for ids": (["RUN", "--prompt-ids", "one"], "--prompt-ids 'one': expected whole numbers"),
    "a number for programmers": (["RUN", "--prompt-ids", "1_0"], "'1_0': expected whole numbers"),
    "a number elsewhere": (["RUN", "--score-ids", "٣"], "expected whole numbers"),
    "a negative token": (["RUN", "--prompt-ids", "7 -1"], "token id -1 in the prompt: expected"),
    "a missing prompt": (["RUN", "--prompt-file", "gone.txt"], "--prompt-file gone.txt: No such"),
    "two prompts": (["RUN", "--prompt", "a", "--prompt-ids", "1"], "exclude each other"),
    "a prompt to talk": (["RUN", "--prompt", "", "--interactive"], "exclude each other"),
    "JSON in talk": (["RUN", "--interactive", "--json"], "--interactive prints no JSON"),
    "a beam in talk": (["RUN", "--interactive", "--beam-width", "2"], "drop --interactive"),
    "a beam that draws": (["RUN", "--beam-width", "2", "--top-p", "0.5"], "drop --top-p"),
    "a hot beam": (["RUN", "--beam-width", "2", "--temperature", "1"], "drop --temperature"),
    "a beam that stops": (["RUN", "--beam-width", "2", "--stop", "a"], "drop --stop"),
    "a beam that slides": (
        ["RUN", "--beam-width", "2", "--on-context-full", "slide"],
        "drop --on-context-full",
    ),
    "a beam that shows": (["RUN", "--beam-width", "2", "--show-probs", "2"], "drop --show-probs"),
    "no beam": (["RUN", "--beam-width", "0"], "--beam-width is 0"),
    "a beam beyond numbers": (["RUN", "--beam-width", "9" * 30], "expected at most 8,355,967"),
    "samples beyond memory": (["RUN", "--num-samples", "3000000000"], "ask for fewer samples"),
    "a narrow beam": (["RUN", "--beam-width", "2", "--num-samples", "3"], "has no more texts"),
    "a penalty for nothing": (["RUN", "--length-penalty", "2"], "add --beam-width"),
    "a penalty that is NaN": (
        ["RUN", "--beam-width", "2", "--length-penalty", "nan"],
        "--length-penalty is nan",
    ),
    "no probabilities": (["RUN", "--show-probs", "0"], "--show-probs is 0"),
    "too many probabilities": (["RUN", "--show-probs", "258"], "--show-probs is 258"),
    "an unscored token": (["RUN", "--score-ids", "-1"], "no token has the id -1"),
    "a score that draws": (["RUN", "--score", "a", "--top-k", "2"], "draws nothing: drop --top-k"),
    "a check that draws": (["RUN", "--check", "--show-probs", "2"], "drop --show-probs"),
    "a check as JSON": (["RUN", "--check", "--json"], "--check prints no JSON"),
    "a stride for nothing": (["RUN", "--stride", "2"], "--stride is for scoring"),
    "no stride": (["RUN", "--score", "a", "--stride", "0"], "--stride is 0"),
    "a stride too long": (
        ["RUN", "--score", "a", "--stride", "17"],
        "--stride is 17: expected 1",
    ),
    "an empty stop": (["RUN", "--stop", ""], "--stop is an empty text"),
    "a bias that is NaN": (["RUN", "--logit-bias", "5", "nan"], "--logit-bias of token 5 is nan"),
    "a bias on nothing": (["RUN", "--logit-bias", "257", "1"], "--logit-bias names token 257"),
    "two biases": (
        ["RUN", "--logit-bias", "5", "1", "--logit_bias=5", "2"],
        "--logit-bias names a token twice: expected one bias",
    ),
    "a stop of half a character": (["RUN", "--stop", "a\udcff"], "'a\\udcff' is not all UTF-8: no"),
    "half a bias": (["RUN", "--logit-bias", "5"], "--logit-bias"),
    "p above 1": (["RUN", "--top-p", "1.5"], "--top-p is 1.5"),
    "no penalty": (["RUN", "--repetition-penalty", "0"], "--repetition-penalty is 0"),
    "another way to be full": (["RUN", "--on-context-full", "wrap"], "wrap"),
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
