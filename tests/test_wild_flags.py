"""Any flag with any word: valid, or refused in one line. Only validation is tried here, and it
compiles nothing."""

import random
from dataclasses import fields

import pytest
from flax.traverse_util import flatten_dict
from programs import TINY, call, snapshot, write_text

from gpt import sample_flags, train_flags
from gpt.compile_log import compilations
from gpt.config import to_json
from gpt.presets import PRESETS
from gpt.sampling import language_model
from gpt.sampling.settings import Settings
from gpt.terminal import flag
from gpt.training import resume

VALUES = ["0", "1", "-1", "16", "0.5", "1e3", "-0.0", "nan", "-inf", "1e-400", "9" * 20, "0x10"]
VALUES += [
    "1_000",
    "٣",
    "",
    " ",
    "-",
    "--",
    "=",
    "~",
    ".",
    "None",
    "True",
    "a\nb",
    "x" * 300,
    "今天",
]
VALUES += ["\x1b[31m", "gpt2", "byte", "muon", "bfloat16", "float64"]
VALUES += ["text.txt", "binary", "folder", "half", "run"]


def names(kind, *left_out):
    return [field.name for field in fields(kind) if field.name not in left_out]


# Every flag but those that plan, try or reach for other machines.
AWAY = ("preset", "train", "processes", "devices", "topology", "dry_run", "verify_resume")
FLAGS = {
    "train": [*names(train_flags.Args, *AWAY), *flatten_dict(to_json(PRESETS["tiny"]), sep=".")],
    "sample": [*names(sample_flags.Args, "settings", "mesh"), *names(Settings)],
}
BASE = {"train": [*TINY, "--data", "text.txt", "--out", "fresh"], "sample": ["run"]}


class Reached(BaseException):
    """All was valid: here the work would begin."""


@pytest.fixture
def world(tmp_path, trained, monkeypatch):
    """A folder with data of all kinds, in which what is valid raises Reached."""
    write_text(tmp_path / "text.txt")
    (tmp_path / "binary").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "folder").mkdir()
    (tmp_path / "half" / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "run").symlink_to(trained[1])
    honest = language_model.load

    def load(checkpoint, *more, **options):
        if str(checkpoint) == "run":
            raise Reached
        return honest(checkpoint, *more, **options)

    def begin(*_):
        raise Reached

    monkeypatch.setattr(language_model, "load", load)
    monkeypatch.setattr(resume, "initial_state", begin)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
def test_wild_flags_are_refused_or_valid(name, n, world):
    before, compiled, rng = snapshot(world), compilations.programs, random.Random(0)
    n_valid = is_valid(name, BASE[name])
    assert n_valid == 1
    for _ in range(n):
        wild = []
        for field in rng.choices(FLAGS[name], k=rng.choice([1, 1, 2])):
            wild += [flag(field), rng.choice(VALUES)]
        n_valid += is_valid(name, [*BASE[name], *wild])
    assert 1 + n // 50 <= n_valid < n
    assert compilations.programs == compiled, "something was compiled"
    assert snapshot(world) == before, "something was written"
