"""train.py: what it refuses, in one line, and never harms."""

import os
import subprocess
import sys

import pytest
from programs import (
    ROOT,
    TINY,
    call,
    damage,
    snapshot,
    write_text,
)

from gpt.training import trainer


def wrong_files(folder):
    """Data that no run can use."""
    (folder / "empty.txt").write_text("")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "one.txt").write_text("a")
    (folder / "short.txt").write_text("a few words")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"\x89PNG\0")
    write_text(folder / "good.txt")
    (folder / "half" / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir(parents=True)


BAD = {
    "empty text": (["--data", "empty.txt"], "empty.txt holds no text"),
    "binary": (["--data", "binary"], "binary cannot be read as text"),
    "one token": (["--data", "one.txt"], "too small"),
    "a folder without text": (["--data", "pictures"], "pictures holds no text"),
    "no path at all": (["--data"], "--data names nothing"),
    "an empty path": (["--data", ""], "a flag has an empty value"),
    "an empty folder": (["--out="], "--out= has an empty value"),
    "a missing path": (["--data", "gone.txt"], "gone.txt does not exist"),
    "too short": (["--data", "short.txt"], "too few for --seq-len 16"),
    "a missing checkpoint": (["--init-from", "gone"], "no checkpoint in gone"),
    "a half-written one": (["--init-from", "half"], "no checkpoint in half"),
    "an unknown flag": (["--stepz", "3"], "did you mean --steps"),
    "an unknown preset": (["gpt-2"], "gpt-2"),
    "a negative number": (["--steps", "-3"], "steps is -3: expected at least 1"),
    "NaN": (["--learning-rate", "nan"], "learning_rate is nan"),
    "a NaN in the model": (["--model.dropout", "nan"], "model.dropout is nan"),
    "an indivisible batch": (["--grad-accum", "3"], "not divisible by grad_accum 3"),
    "a mesh that is not there": (["--mesh.data", "3"], "does not fill"),
    "a file as --out": (["--out", "good.txt"], "--out good.txt cannot be used"),
    "a file above --out": (["--out", "good.txt/run"], "--out good.txt/run cannot be used"),
    "an unknown tokenizer": (["--tokenizer", "words"], "'words' is neither a tokenizer nor a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_and_changes_nothing(case, tmp_path, monkeypatch):
    argv, words = BAD[case]
    wrong_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    done = call("train", *TINY, "--data", "good.txt", "--out", "run", *argv)
    assert done.code == 2
    error = done.err[done.err.index("error: ") :]
    assert words in error and error.count("\n") == 1 and done.err.count("error: ") == 1
    assert snapshot(tmp_path) == before


def test_a_batch_that_the_mesh_cannot_divide(text, tmp_path, monkeypatch):
    """As with two devices, of which there is one here."""
    honest = trainer.require_fit
    wide = type("Mesh", (), {"shape": {"data": 3, "fsdp": 1, "tensor": 1}})
    monkeypatch.setattr(trainer, "require_fit", lambda config, mesh: honest(config, wide))
    done = call("train", *TINY, "--data", text, "--out", tmp_path / "run")
    assert done.code == 2 and "does not divide among 3 devices" in done.err
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours_to_write(text, tmp_path):
    tmp_path.chmod(0o500)
    done = call("train", *TINY, "--data", text, "--out", tmp_path / "run")
    assert done.code == 2 and f"{tmp_path} is not a folder that you may write to" in done.err


def test_a_run_of_which_nothing_is_whole(text, finished):
    damage(finished, 8, 12)
    before = snapshot(finished)
    done = call("train", *TINY, "--data", text, "--out", finished)
    assert done.code == 2 and "is whole: " in done.err and "checkpoints/8" in done.err
    assert snapshot(finished) == before


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
