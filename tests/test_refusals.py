"""What commands refuse: in one line, before anything is written or harmed."""

import importlib.util
import random
from dataclasses import fields
from pathlib import Path

import jax
import pytest
from flax.traverse_util import flatten_dict
from programs import TINY, call, refuse, snapshot, write_text

from gpt import sample_flags, train_flags
from gpt.compile_log import compilations
from gpt.config import to_json
from gpt.errors import UserError
from gpt.presets import PRESETS
from gpt.sampling import language_model
from gpt.sampling.settings import Settings
from gpt.terminal import flag
from gpt.training import resume

# One of each kind: what is refused by a setting or by the text is tested where it is raised.
TRAIN = {
    "text that cannot be read": (["--data", "gone.txt"], "gone.txt does not exist"),
    "a setting": (["--steps", "-3"], "steps is -3: expected at least 1"),
    "too short a proof": (["--verify-resume", "--steps", "1"], "it needs --steps 2 or more"),
    "no path at all": (["--data"], "--data needs at least one path"),
    "an empty path": (["--data", ""], "a flag has an empty value"),
    "an empty folder": (["--out="], "--out= has an empty value"),
    "remote storage": (["--out", "gs://bucket/run"], "gs://bucket/run is a URL"),
    "a web page": (
        ["--data", "https://a.org/b.txt"],
        "fetch it first (curl -LO https://a.org/b.txt)",
    ),
    "too short": (["--data", "short.txt"], "too few for --seq-len 16"),
    "a missing checkpoint": (["--init-from", "gone"], "no folder gone"),
    "a pickle to start from": (["--init-from", "nano.pt"], "a pickle can run arbitrary code"),
    "a file as --out": (["--out", "text.txt"], "--out text.txt cannot be used"),
    "a file above --out": (["--out", "text.txt/run"], "--out text.txt/run cannot be used"),
}
SAMPLE = {
    "no checkpoint named": ([], "CHECKPOINT"),
    "a prompt without its flag": (["RUN", "the"], "unexpected argument 'the': "),
    "a missing folder": (["gone"], "no folder gone"),
    "a model of transformers": (["theirs"], "python -m gpt.convert import"),
    "a pickle": (["nano.pt"], "no checkpoint in nano.pt: expected a run's folder"),
    "a half-written checkpoint": (["half"], "no checkpoint in half"),
    "a step that is not there": (["RUN", "--step", "5"], "it has [8, 12]"),
    "a beam beyond memory": (["RUN", "--beam-width", "9" * 30], "ask for fewer samples, beams"),
    "a prefix it lacks": (["RUN", "--prefix", "bos"], "the model has no beginning-of-text token"),
}
REPORT = {
    "no run": (["--out", "a.html"], "no run given"),
    "a missing run": (["gone", "--out", "a.html"], "no folder gone: expected a run's folder"),
    "an empty run": (["folder"], "holds neither metrics.jsonl nor a checkpoint"),
    "no place for the page": (["folder", "--out", "no/such/a.html"], "does not exist"),
    "two runs without --out": (["folder", "folder"], "add --out FILE"),
}
TOUR = {
    "no place": (["RUN", "--out", "no/such/a.html"], "does not exist"),
    "a setting of the sampler": (["RUN", "--temperature", "-1"], "temperature is -1"),
    "a flag of sample.py": (["RUN", "--stop", "x"], "--stop"),
    "two prompts": (["RUN", "--prompt", "a", "--prompt-ids", "1"], "cannot be combined"),
}
PREPARE = {
    "no source": ([], "prepare needs a SOURCE"),
    "a missing source": (["gone"], "gone does not exist"),
    "a folder in use": (["text.txt", "--out", "theirs"], "theirs already exists"),
    "no workers": (["text.txt", "--workers", "0"], "workers is 0"),
}
CASES = {
    "train": TRAIN,
    "sample": SAMPLE,
    "gpt/report": REPORT,
    "gpt/tour": TOUR,
    "gpt/data/__main__": PREPARE,
}
BASE = {
    "train": [*TINY, "--data", "text.txt", "--out", "fresh"],
    "gpt/data/__main__": ["prepare", "--tokenizer", "byte", "--out", "fresh"],
}


@pytest.fixture
def world(tmp_path, trained, monkeypatch):
    """The working directory: text, a run, and what may be taken for them."""
    write_text(tmp_path / "text.txt")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "binary").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "nano.pt").write_bytes(b"PK")
    (tmp_path / "folder").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    (tmp_path / "half" / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "RUN").symlink_to(trained[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in CASES for case in CASES[name]])
def test_bad_input_is_one_error_and_changes_nothing(name, case, world):
    argv, words = CASES[name][case]
    before = snapshot(world)
    done = call(name, *BASE.get(name, ()), *argv)
    assert (done.code, done.out) == (2, "")
    error = done.err[done.err.index("error: ") :]
    assert words in error and error.count("\n") == 1 and done.err.count("error: ") == 1
    assert name in BASE or error == done.err
    assert snapshot(world) == before


def test_typed_paths_are_expanded(tmp_path, monkeypatch):
    """A shell leaves `--out=~/run` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--out=~/run", "--init-from", "~/other", "--data", "a.txt", "~/b.txt", "~nobody-here/c"]
    args = train_flags.parse_args(argv, "")
    assert (args.out, args.init_from) == (tmp_path / "run", tmp_path / "other")
    assert args.data == (Path("a.txt"), tmp_path / "b.txt", Path("~nobody-here/c"))


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_devices_that_are_not_there(error, text, tmp_path, monkeypatch):
    """JAX_PLATFORMS=cuda without CUDA, as JAX 0.12 and 0.10 report it."""

    def default_backend():
        raise error("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "default_backend", default_backend)
    done = call("train", *TINY, "--data", text, "--out", tmp_path / "run")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "JAX finds no such device" in done.err and ".[cuda]" in done.err
    assert snapshot(tmp_path) == {}


def test_a_warmup_that_takes_the_whole_run_is_noted(text, tmp_path):
    argv = [*TINY, "--data", text, "--out", tmp_path / "run", "--profile", "10"]  # is refused
    done = call("train", *argv, "--warmup-steps", "11")
    assert "note: a warm-up of 11 steps takes the whole run of 12: " in done.err
    assert "note: " not in call("train", *argv, "--warmup-steps", "10").err


# sample.py's flags that cannot be combined, or need each other.

# What is typed after the run's folder, and what the error says.
BAD_FLAGS = {
    "--score x --check": "--check and --score cannot be combined: choose one",
    "--prompt a --prompt-ids 1": "--prompt and --prompt-ids cannot be combined",
    "--max-new-tokens -1": "max_new_tokens is -1: expected at least 1",
    "--temperature inf": "temperature is inf: expected zero or more, and finite",
    "--show-probs 0": "show_probs is 0: expected at least 1",
    "--stop=": "stop is an empty text",
    "--logit-bias 5": "--logit-bias needs 2 values after it",
    "--logit-bias the 5": "--logit-bias needs two numbers after it, the first an integer",
    "--logit-bias 5 1 --logit_bias=5 2": "--logit-bias names a token twice",
    "--prompt-ids one": "--prompt-ids 'one': expected integers",
    "--prompt-file gone.txt": "--prompt-file gone.txt: No such",
    "--interactive --json": "--json has no effect with --interactive: leave it out",
    "--beam-width 2 --top-p 0.5": "--top-p has no effect with --beam-width",
    "--beam-width 2 --temperature 1": "--temperature has no effect with --beam-width",
    "--beam-width 2 --num-samples 3": "--num-samples is 3: it must not exceed --beam-width, 2",
    "--length-penalty 2": "--length-penalty needs --beam-width",
    "--draft runs/b": "--draft needs --speculate, the number of tokens to propose per step",
    "--score a --top-k 2": "--top-k has no effect with --score",
    "--check --json": "--json has no effect with --check",
    "--stride 2": "--stride needs --score",
    "--promt x": "did you mean --prompt",
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


# Any flag with any word: valid, or refused.

VALUES = ["0", "1", "-1", "16", "0.5", "1e3", "-0.0", "nan", "-inf", "1e-400", "9" * 20, "0x10"]
VALUES += ["1_000", "٣", "今天", "", " ", "-", "--", "=", "~", ".", "None", "True", "a\nb"]
VALUES += ["\x1b[31m", "x" * 300, "gpt2", "byte", "muon", "bfloat16", "float64"]
VALUES += ["text.txt", "binary", "folder", "half", "RUN"]


def names(kind, *left_out):
    return [field.name for field in fields(kind) if field.name not in left_out]


# Every flag but those that plan, try or reach for other machines.
AWAY = ("preset", "train", "processes", "devices", "topology", "dry_run", "verify_resume")
FLAGS = {
    "train": [*names(train_flags.Args, *AWAY), *flatten_dict(to_json(PRESETS["tiny"]), sep=".")],
    "sample": [*names(sample_flags.Args, "settings", "mesh"), *names(Settings)],
}


class Reached(BaseException):
    """All was valid: here the work would begin."""


@pytest.fixture
def only_validation(world, monkeypatch):
    """What is valid raises Reached."""
    honest = language_model.load

    def load(checkpoint, *more, **options):
        if str(checkpoint) == "RUN":
            raise Reached
        return honest(checkpoint, *more, **options)

    def begin(*_):
        raise Reached

    monkeypatch.setattr(language_model, "load", load)
    monkeypatch.setattr(resume, "initial_state", begin)


def is_valid(name, argv) -> bool:
    """Whether a command line is; if not, it must be refused in one line."""
    try:
        done = call(name, *argv)
    except Reached:
        return True
    assert done.code == 2 and "Traceback" not in done.err, (done.err, argv)
    refusal = done.err[done.err.rindex("error: ") :]
    lines = 1 + sum(word.count("\n") for word in argv)
    assert refusal.count("\n") <= lines or "\n  " in refusal, refusal  # a list has lines
    return False


@pytest.mark.parametrize("n", [20, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["train", "sample"])
def test_wild_flags_are_refused_or_valid(name, n, world, only_validation):
    before, compiled, rng = snapshot(world), compilations.programs, random.Random(0)
    base = BASE.get(name, ["RUN"])
    n_valid = is_valid(name, base)
    assert n_valid == 1
    for _ in range(n):
        wild = []
        for field in rng.choices(FLAGS[name], k=rng.choice([1, 1, 2])):
            wild += [flag(field), rng.choice(VALUES)]
        n_valid += is_valid(name, [*base, *wild])
    assert 1 + n // 50 <= n_valid < n
    assert compilations.programs == compiled, "something was compiled"
    assert snapshot(world) == before, "something was written"


# python -m gpt.evaluate, without lm-eval.


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "--tasks ,": "--tasks is empty: expected names separated by commas",
        "--tasks a --limit 0": "--limit is 0: expected at least 1",
        "--tasks a --include-path nowhere": "--include-path nowhere: no such folder",
        "--tasks a --json nowhere/a.json": "--json nowhere/a.json: folder",
        "--tasks a": "lm-eval, which is not installed: pip install -e '.[eval]'",
    }.items(),
)
def test_what_cannot_be_evaluated_is_refused(flags, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = refuse(message, "gpt/evaluate/__main__", "run", *flags.split())
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
