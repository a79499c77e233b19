"""train.py: what it refuses, in one line, and never harms."""

from pathlib import Path

import jax
import pytest
from programs import TINY, call, snapshot, write_text

from gpt import train_flags

# One of each kind: what is refused by a setting or by the text is tested where it is raised.
BAD = {
    "text that cannot be read": (["--data", "gone.txt"], "gone.txt does not exist"),
    "a setting": (["--steps", "-3"], "steps is -3: expected at least 1"),
    "no path at all": (["--data"], "--data names nothing"),
    "an empty path": (["--data", ""], "a flag has an empty value"),
    "an empty folder": (["--out="], "--out= has an empty value"),
    "remote storage": (["--out", "gs://bucket/run"], "gs://bucket/run is an address"),
    "a web page": (
        ["--data", "https://a.org/b.txt"],
        "fetch it first (curl -LO https://a.org/b.txt)",
    ),
    "remote weights": (["--init-from=s3://bucket/run"], "s3://bucket/run is an address"),
    "too short": (["--data", "short.txt"], "too few for --seq-len 16"),
    "a missing checkpoint": (["--init-from", "gone"], "no checkpoint in gone"),
    "an unknown flag": (["--stepz", "3"], "did you mean --steps"),
    "an unknown preset": (["gpt-2"], "gpt-2"),
    "a mesh that is not there": (["--mesh.data", "3"], "does not fill"),
    "a file as --out": (["--out", "good.txt"], "--out good.txt cannot be used"),
    "a file above --out": (["--out", "good.txt/run"], "--out good.txt/run cannot be used"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_and_changes_nothing(case, tmp_path, monkeypatch):
    argv, words = BAD[case]
    write_text(tmp_path / "good.txt")
    (tmp_path / "short.txt").write_text("a few words")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    done = call("train", *TINY, "--data", "good.txt", "--out", "run", *argv)
    assert done.code == 2
    error = done.err[done.err.index("error: ") :]
    assert words in error and error.count("\n") == 1 and done.err.count("error: ") == 1
    assert snapshot(tmp_path) == before


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
    assert "JAX finds no such device" in done.err and "gpt-jax[cuda]" in done.err
    assert snapshot(tmp_path) == {}


def test_a_warmup_that_takes_the_whole_run_is_noted(text, tmp_path):
    argv = [*TINY, "--data", text, "--out", tmp_path / "run", "--profile", "10"]  # is refused
    done = call("train", *argv, "--warmup-steps", "11")
    assert "note: a warm-up of 11 steps takes the whole run of 12: " in done.err
    assert "note: " not in call("train", *argv, "--warmup-steps", "10").err
