"""Wild flags, files and data, thrown at both programs: refused in one line, nothing harmed.

A case that is valid ends where the work would begin: only validation is tried here, and it compiles
nothing.
"""

import gzip
import random
from contextlib import contextmanager
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from programs import TINY, call, write_text

from gpt import sample_flags, train_flags
from gpt.compile_log import compilations
from gpt.config import to_json
from gpt.presets import PRESETS
from gpt.sampling import language_model
from gpt.sampling.settings import Settings
from gpt.terminal import flag
from gpt.training import resume

CASES = 20  # of each program; in make test-all a thousand
NUMBERS = [
    "0", "1", "-1", "2", "3", "7", "64", "1e3", "1.5", "-0.0", "nan", "inf", "-inf", "1e400",
    "1e-400", "2147483647", "2147483648", "99999999999999999999", "-99999999999999999999",
    "0x10", "1_000", "٣", "1,5", "", " ", "None", "True",
]  # fmt: skip
GOOD = ["1", "2", "4", "8", "16", "0.5", "1e-3", "0.1"]
WORDS = [
    "", " ", "-", "--", "---", "--=", "=", "-h=", "~", ".", "/dev/null", "*",
    "tiny", "gpt2", "byte", "char", "bpe", "adamw", "muon", "float32", "bfloat16", "float64", "ema",
    "今天", "\udc80", "\u202e", "\x1b[31m", "a\nb", "x" * 300, "nofile", "text.txt", "empty.txt",
    "binary", "folder", "loop", "good.gz", "bad.gz", "lines.jsonl", "bad.jsonl", "prepared",
    "no-header", "half", "run",
]  # fmt: skip
OF_TEXT = {"data", "out", "init_from", "tokenizer", "prompt", "prompt_file", "score", "score_file"}


def names(kind, *left_out):
    return [field.name for field in fields(kind) if field.name not in left_out]


# Every flag but those that plan, try or reach for other machines.
AWAY = ("preset", "train", "processes", "devices", "topology", "dry_run", "verify_resume")
NAMES = {
    "train": [
        *names(train_flags.Args, *AWAY),
        *flatten_dict(to_json(PRESETS["tiny"]), sep="."),
        "nonsense",
        "model.nonsense",
    ],
    "sample": [*names(sample_flags.Args, "settings", "mesh"), *names(Settings), "nonsense"],
}
SWITCHES = {
    "train": ["--overwrite", "--unroll", "--model.tied", "--keep-going", "--no-model.bias"],
    "sample": ["--json", "--verbose", "--ignore-eos", "--interactive", "--check", "--no-check"],
}


class Reached(BaseException):
    """All was valid: here the work would begin."""


@pytest.fixture(scope="module")
def world(tmp_path_factory, trained):
    """A folder with data of all kinds, good and bad."""
    place = tmp_path_factory.mktemp("wild")
    write_text(place / "text.txt")
    (place / "empty.txt").write_text("")
    (place / "binary").write_bytes(random.Random(0).randbytes(5000))
    (place / "folder").mkdir()
    (place / "loop").symlink_to("loop")
    (place / "good.gz").write_bytes(gzip.compress(b"some words " * 200))
    (place / "bad.gz").write_bytes(gzip.compress(b"some words " * 200)[:60])
    (place / "lines.jsonl").write_text('{"text": "some words of a line"}\n' * 50)
    (place / "bad.jsonl").write_text('{"text": 3}\n[[[[\n')
    (place / "prepared").mkdir()
    (place / "prepared" / "header.json").write_text('{"version": 99, "dtype": "object"}')
    (place / "no-header").mkdir()
    for split in ("train", "val"):
        np.arange(3000, dtype=np.uint16).tofile(place / "no-header" / f"{split}.bin")
    (place / "half" / "checkpoints" / "12").mkdir(parents=True)
    (place / "run").symlink_to(trained[1])
    return place


@st.composite
def pieces(draw, name):
    """A flag with a value that suits its kind or any other, a flag alone, or a word."""
    field = draw(st.sampled_from(NAMES[name]))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return [draw(st.sampled_from(WORDS))]
    if kind == 1:
        return [draw(st.sampled_from([flag(field), *SWITCHES[name]]))]
    likely = WORDS if field in OF_TEXT else [*NUMBERS, *GOOD * 3]
    letters = st.characters(exclude_characters="\0/")
    anything = st.sampled_from([*NUMBERS, *WORDS]) | st.text(letters, max_size=8)
    value = draw(st.sampled_from(likely) | anything)
    return [f"{flag(field)}={value}"] if kind == 2 else [flag(field), value]


def files(place):
    """Each file or link below a folder, with its size and the time when it was last written."""
    found = [path for path in place.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


@contextmanager
def only_validation(world):
    """Within, in `world`, what is valid raises Reached; nothing may be compiled or harmed."""
    honest = language_model.load

    def load(checkpoint, *more, **options):
        if str(checkpoint) == "run":
            raise Reached
        return honest(checkpoint, *more, **options)

    def begin(*_):
        raise Reached

    before, compiled = files(world), compilations.programs
    with (
        open("/dev/null", encoding="utf-8") as nothing,
        pytest.MonkeyPatch.context() as patch,
        mock.patch.object(resume, "initial_state", begin),
        mock.patch.object(language_model, "load", load),
        mock.patch("sys.stdin", nothing),
    ):
        patch.chdir(world)
        yield
    assert compilations.programs == compiled, "something was compiled"
    assert files(world) == before, "something was written"


def try_case(name, argv, world):
    """One case: valid, or refused in one line."""
    with only_validation(world):
        try:
            done = call(name, *argv)
        except Reached:
            return "valid"
    if done.code == 0:
        assert "--help" in argv or "-h" in argv, argv
        return "help"
    assert done.code == 2 and "Traceback" not in done.err, (done.err, argv)
    refusal = done.err[done.err.rindex("error: ") :]
    lines = 1 + sum(word.count("\n") for word in argv)
    assert refusal.count("\n") <= lines or "\n  " in refusal, refusal  # a list has lines
    return refusal


@pytest.mark.parametrize("n", [CASES, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["train", "sample"])
def test_wild_flags_are_refused_or_valid(name, n, world):
    found = []
    base = [*TINY, "--data", "text.txt", "--out", "fresh"] if name == "train" else ["run"]

    @settings(max_examples=n, suppress_health_check=list(HealthCheck), database=None)
    @given(argv=st.lists(pieces(name), min_size=1, max_size=4), bare=st.integers(0, 9))
    @example(argv=[], bare=1)  # valid
    @example(argv=[["--no-such-flag"]], bare=1)
    def throw(argv, bare):
        argv = [word for piece in argv for word in piece]
        found.append(try_case(name, argv if bare == 0 else [*base, *argv], world))

    throw()
    n_valid = found.count("valid")
    # Of few cases chance may leave only one that is valid: the one that is in every run.
    at_least = (1, 1) if n == CASES else (n / 50, n / 10)
    assert n_valid >= at_least[0] and len(found) - n_valid >= at_least[1], found
