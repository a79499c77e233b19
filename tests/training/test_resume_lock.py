"""A run's folder belongs to one trainer: a second is refused, a dead one is not in the way."""

import subprocess
import sys

import pytest
from programs import ROOT, TINY, call, snapshot

from gpt.errors import UserError
from gpt.training import run_dir

HOLD = """
import sys, time
from pathlib import Path
from gpt.training import run_dir
with run_dir.lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_trainer_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    run = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            before = snapshot(tmp_path)
            done = call("train", *TINY, "--out", run, "--overwrite")
            assert done.code == 2
            assert done.err == (
                f"error: another train.py is at work in {run}: wait for it, stop it, or choose "
                "another --out\n"
            )
            assert snapshot(tmp_path) == before
        finally:
            other.kill()
    assert (run / run_dir.LOCK).exists()  # left behind
    with run_dir.lock_run(run):
        pass
    assert not (run / run_dir.LOCK).exists()


def test_a_folder_is_held_once_in_one_process_too(tmp_path):
    run = tmp_path / "a" / "run"
    with run_dir.lock_run(run):
        with pytest.raises(UserError, match="at work"), run_dir.lock_run(run):
            pass
        run_dir.remove_run(run)  # as with --overwrite: the lock is not a file of the run
        with pytest.raises(UserError, match="at work"), run_dir.lock_run(run):
            pass
    assert snapshot(tmp_path) == {}  # the folders that were made for it are gone
    with run_dir.lock_run(run):
        (run / "notes").write_text("mine")
    assert snapshot(tmp_path) == {"a": None, "a/run": None, "a/run/notes": b"mine"}
