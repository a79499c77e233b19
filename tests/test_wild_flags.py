"""Wild flags, files and data, thrown at both programs: refused in one line, nothing harmed.

A case that is valid ends where the work would begin: only validation is tried here, and it compiles
nothing. Real processes are few, and mostly wrong.
"""

import gzip
import random
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from programs import ROOT, TINY, call, write_text

from gpt.compile_log import compilations
from gpt.sampling import language_model
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
TRAIN = [
    "--steps", "--batch-size", "--seq-len", "--grad-accum", "--learning-rate", "--warmup-steps",
    "--min-learning-rate", "--beta1", "--beta2", "--weight-decay", "--optimizer", "--schedule",
    "--muon-learning-rate", "--decay-fraction", "--label-smoothing", "--z-loss", "--ema-decay",
    "--clip-norm", "--max-bad-steps", "--dtype", "--seed", "--log-every", "--eval-every",
    "--eval-tokens", "--sample-every", "--save-every", "--keep", "--keep-best", "--vocab-size",
    "--model.n-layers", "--model.n-heads", "--model.n-kv-heads", "--model.d-model",
    "--model.d-head", "--model.d-ff", "--model.positions", "--model.norm", "--model.mlp",
    "--model.dropout", "--model.rope-theta", "--model.init-std", "--model.logit-softcap",
    "--model.context-length", "--mesh.data", "--mesh.fsdp", "--mesh.tensor", "--profile",
    "--memory-gb", "--tokenizer", "--data", "--out", "--init-from",
    "--nonsense",
    "--model.nonsense",
]  # fmt: skip
SAMPLE = [
    "--prompt", "--prompt-file", "--prompt-ids", "--max-new-tokens", "--temperature", "--top-k",
    "--top-p", "--min-p", "--repetition-penalty", "--seed", "--num-samples", "--stop",
    "--beam-width", "--length-penalty", "--show-probs", "--score", "--score-file", "--score-ids",
    "--stride", "--step", "--dtype", "--weights", "--on-context-full", "--mesh.data",
    "--mesh.tensor", "--nonsense",
]  # fmt: skip
SWITCHES = {
    "train": ["--overwrite", "--no-remat", "--model.tied", "--keep-going", "--no-model.bias"],
    "sample": ["--json", "--verbose", "--ignore-eos", "--interactive", "--check", "--no-check"],
}
SIZES = {"--data": WORDS, "--out": WORDS, "--init-from": WORDS, "--tokenizer": WORDS}
SIZES |= dict.fromkeys(("--prompt", "--prompt-file", "--score", "--score-file", "--stop"), WORDS)


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


def values(flag):
    """What may stand after a flag: mostly what suits its kind, sometimes anything."""
    likely = SIZES.get(flag, [*NUMBERS, *GOOD * 3])
    return (
        st.sampled_from(likely)
        | st.sampled_from([*NUMBERS, *WORDS])
        | st.text(st.characters(exclude_characters="\0/"), max_size=8)
    )


def argvs(flags, switches):
    """Some flags with values, some without, in any order."""
    pair = st.sampled_from(flags).flatmap(lambda flag: st.tuples(st.just(flag), values(flag)))
    joined = pair.map(lambda two: ("=".join(two),))
    alone = st.sampled_from([*flags, *switches]).map(lambda flag: (flag,))
    loose = st.sampled_from(WORDS).map(lambda word: (word,))
    pieces = st.lists(pair | pair | pair | joined | alone | loose, min_size=1, max_size=4)
    return pieces.map(lambda found: [word for piece in found for word in piece])


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
    helped = done.code == 0 and ("--help" in argv or "-h" in argv)
    assert done.code == 2 or helped, (done.code, argv)
    assert helped or done.err.count("error: ") >= 1, done.err
    assert "Traceback" not in done.err
    last = done.err[done.err.rindex("error: ") :] if not helped else ""
    lines = 1 + sum(word.count("\n") for word in argv)
    assert last.count("\n") <= lines or "\n  " in last, last  # a list of differences has lines
    return last


def throw(name, world, n):
    """`n` wild command lines at a program; what became of each: "valid", or the refusal."""
    found = []
    base = [*TINY, "--data", "text.txt", "--out", "fresh"] if name == "train" else ["run"]
    flags = TRAIN if name == "train" else SAMPLE

    @settings(max_examples=n, suppress_health_check=list(HealthCheck), database=None)
    @given(argv=argvs(flags, SWITCHES[name]), bare=st.integers(0, 9))
    def each(argv, bare):
        found.append(try_case(name, argv if bare == 0 else [*base, *argv], world))

    each = example(argv=[], bare=1)(each)  # valid
    each = example(argv=["--no-such-flag"], bare=1)(each)
    each()
    return found


@pytest.mark.parametrize("n", [CASES, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["train", "sample"])
def test_wild_flags_are_refused_or_valid(name, n, world):
    found = throw(name, world, n)
    n_valid = found.count("valid")
    n_refused = len(found) - n_valid
    # Of few cases chance may leave only one that is valid: the one that is in every run.
    at_least = (1, 1) if n == CASES else (n / 50, n / 10)
    assert n_valid >= at_least[0] and n_refused >= at_least[1], found


@pytest.mark.slow
def test_fifty_real_processes(world):
    """One flag more, mostly wrong. What is right plans a training, or samples to its end."""
    chance, before = random.Random(0), files(world)
    for i in range(50):
        name = ("train", "sample")[i % 2]
        flag = chance.choice((TRAIN, SAMPLE)[i % 2])
        bad = [flag, chance.choice([*NUMBERS, "nofile", "\x1b[31m", "3000000000"])]
        base = [*TINY, "--data", "text.txt", "--out", "fresh", "--dry-run"]
        argv = [*(base if name == "train" else ["run", "--max-new-tokens", "4"]), *bad]
        done = subprocess.run(
            [sys.executable, ROOT / f"{name}.py", *argv],
            cwd=world, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip
        said = f"{bad}: {done.stderr[-1500:]}"
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, said
        assert done.stderr.count("error: ") == (done.returncode == 2), said
    assert files(world) == before
