"""train.py: what it refuses, in one line, and never harms."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from programs import ROOT, TINY, call, snapshot, write_text

from gpt import cli, train_flags
from gpt.training import train_step

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


def test_numbers_of_64_bits_are_turned_off(tmp_path, monkeypatch):
    """Muon's state would have some, and no checkpoint has a digest for them."""
    monkeypatch.setattr(cli, "_keep_freed_memory", lambda: None)
    environ = {"JAX_ENABLE_X64": "1", "XDG_CACHE_HOME": str(tmp_path)}
    monkeypatch.setattr(cli.os, "environ", environ)
    cli.prepare_jax()
    assert environ["JAX_ENABLE_X64"] == "0"


def test_a_warmup_that_takes_the_whole_run_is_noted(text, tmp_path):
    argv = [*TINY, "--data", text, "--out", tmp_path / "run", "--profile", "10"]  # is refused
    done = call("train", *argv, "--warmup-steps", "11")
    assert "note: a warm-up of 11 steps takes the whole run of 12: " in done.err
    assert "note: " not in call("train", *argv, "--warmup-steps", "10").err


def test_a_batch_that_the_mesh_cannot_divide(text, tmp_path, monkeypatch):
    """As with two devices, of which there is one here."""
    honest = train_step.require_fit
    wide = type("Mesh", (), {"shape": {"data": 3, "fsdp": 1, "tensor": 1}})
    monkeypatch.setattr(train_step, "require_fit", lambda config, mesh: honest(config, wide))
    done = call("train", *TINY, "--data", text, "--out", tmp_path / "run")
    assert done.code == 2 and "does not divide among 3 devices" in done.err
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours_to_write(text, tmp_path):
    tmp_path.chmod(0o500)
    done = call("train", *TINY, "--data", text, "--out", tmp_path / "run")
    assert done.code == 2 and f"{tmp_path} is not a folder that you may write to" in done.err


def test_an_encoding_that_is_not_here(text, tmp_path, monkeypatch):
    def no_network(url):
        raise OSError("no route to host")

    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    argv = [*TINY, "--tokenizer", "gpt2", "--data", text, "--out", tmp_path / "run"]
    done = call("train", *argv)
    assert done.code == 2 and "set TIKTOKEN_CACHE_DIR to it" in done.err
    assert snapshot(tmp_path) == {}


def test_a_real_process_refuses_in_one_line():
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--stepz", "3"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
