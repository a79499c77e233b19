"""sample.py: bad input is one error, reported before anything is printed or changed."""

import pytest
from programs import call, snapshot

from gpt import sample_flags
from gpt.errors import UserError

# Refused before anything is loaded: what is typed after the run's folder, and what the error says.
BAD_FLAGS = {
    "--score x --check": "--check and --score exclude each other: choose one",
    "--prompt a --prompt-ids 1": "--prompt and --prompt-ids exclude each other",
    "--prompt= --interactive": "--interactive and --prompt exclude each other",
    "--max-new-tokens -1": "max_new_tokens is -1: expected at least 1",
    "--temperature inf": "temperature is inf: expected zero or more, and finite",
    "--show-probs 0": "show_probs is 0: expected at least 1",
    "--stop=": "stop is an empty text",
    "--logit-bias 5": "--logit-bias",
    "--logit-bias 5 1 --logit_bias=5 2": "--logit-bias names a token twice",
    "--prompt-ids one": "--prompt-ids 'one': expected integers",
    "--score-ids \N{ARABIC-INDIC DIGIT THREE}": "expected integers",
    "--prompt-file gone.txt": "--prompt-file gone.txt: No such",
    "--interactive --json": "--json has no effect with --interactive: leave it out",
    "--interactive --beam-width 2": "--beam-width has no effect with --interactive",
    "--beam-width 2 --top-p 0.5": "--top-p has no effect with --beam-width",
    "--beam-width 2 --temperature 1": "--temperature has no effect with --beam-width",
    "--beam-width 2 --stop a": "--stop has no effect with --beam-width",
    "--beam-width 2 --on-context-full slide": "--on-context-full has no effect with --beam-width",
    "--beam-width 2 --show-probs 2": "--show-probs has no effect with --beam-width",
    "--beam-width 2 --num-samples 3": "--num-samples is 3: it must not exceed --beam-width, 2",
    "--length-penalty 2": "--length-penalty needs --beam-width",
    "--score a --top-k 2": "--top-k has no effect with --score",
    "--check --show-probs 2": "--show-probs has no effect with --check",
    "--check --json": "--json has no effect with --check",
    "--stride 2": "--stride needs --score",
    "--window 2": "--window needs --score",
    "--early-stopping never": "--early-stopping needs --beam-width",
    "--check --prefix eos": "--prefix has no effect with --check",
    "--on-context-full wrap": "wrap",
    "--promt x": "did you mean --prompt",
}

# Refused when the checkpoint or the model is known.
BAD_INPUT = {
    "no checkpoint named": ([], "CHECKPOINT"),
    "a missing folder": (["gone"], "no folder gone"),
    "a half-written checkpoint": (["half"], "no checkpoint in half"),
    "a damaged checkpoint": (["cut"], "is whole: "),
    "a step that is not there": (["RUN", "--step", "5"], "it has [8, 12]"),
    "a long prompt": (["RUN", "--prompt", "x" * 17], "17 tokens, which exceeds"),
    "a beam beyond memory": (["RUN", "--beam-width", "9" * 30], "ask for fewer samples, beams"),
    "a prefix it lacks": (["RUN", "--prefix", "bos"], "the model has no beginning-of-text token"),
    "nothing to score": (["RUN", "--score", ""], "nothing to score"),
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_flags_that_make_no_sense_are_refused_before_anything_is_loaded(flags):
    with pytest.raises(UserError) as refused:
        args, _ = sample_flags.parse_args(["no such run", *flags.split()], "")
        sample_flags.read_inputs(args)
    assert BAD_FLAGS[flags] in str(refused.value) and "\n" not in str(refused.value)


def test_flags_that_make_sense_choose_the_mode():
    for flags, mode in {
        "": "generate",
        "--beam-width 1 --json --show-probs 2": "generate",
        "--beam-width 2 --temperature 0 --length-penalty 2 --num-samples 2": "beam",
        "--interactive --show-probs 2 --top-k 3": "interactive",
        "--score a --stride 2 --json --quantize int8": "score",
        "--check --dtype bfloat16 --mesh.tensor 2": "check",
        "--no-check --no-json --prompt a": "generate",
    }.items():
        assert sample_flags.parse_args(["run", *flags.split()], "")[1] == mode, flags


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_error(case, trained, tmp_path, monkeypatch):
    argv, words = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half" / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir(parents=True)
    # A run whose only checkpoint has lost half of its metadata.
    (tmp_path / "cut" / "checkpoints" / "1").mkdir(parents=True)
    damaged = tmp_path / "cut" / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    damaged.write_text('{"metadata": {"mod')
    before = snapshot(tmp_path)
    done = call("sample", *[trained[1] if word == "RUN" else word for word in argv])
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and words in done.err
    assert snapshot(tmp_path) == before
