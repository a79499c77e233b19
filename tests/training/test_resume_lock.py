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


@pytest.fixture
def elsewhere():
    """Have another process hold a folder: it is returned."""
    running = []

    def start(folder):
        words = [sys.executable, "-c", HOLD, str(folder)]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_trainer_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path, text, elsewhere):
    run = tmp_path / "run"
    other = elsewhere(run)
    before = snapshot(tmp_path)
    for more in ((), ("--overwrite",)):
        done = call("train", *TINY, "--data", text, "--out", run, *more)
        assert done.code == 2
        assert done.err == (
            f"error: another train.py is at work in {run}: wait for it, stop it, or choose another "
            "--out\n"
        )
    assert snapshot(tmp_path) == before
    other.kill()
    other.wait()
    assert (run / run_dir.LOCK).exists()  # left behind
    assert call("train", *TINY, "--data", text, "--out", run, "--overwrite").code == 0
    assert not (run / run_dir.LOCK).exists()


def test_overwriting_does_not_let_go_of_the_folder(tmp_path, elsewhere):
    """The file that is locked is not one that a run writes."""

    elsewhere(tmp_path / "run")
    run_dir.remove_run(tmp_path / "run")
    with pytest.raises(UserError, match="at work"), run_dir.lock_run(tmp_path / "run"):
        pass


def test_a_folder_is_held_once_in_one_process_too(tmp_path):
    with (
        run_dir.lock_run(tmp_path / "a" / "run"),
        pytest.raises(UserError, match="at work"),
        run_dir.lock_run(tmp_path / "a" / "run"),
    ):
        pass
    assert snapshot(tmp_path) == {}  # what was made for it is gone
    with run_dir.lock_run(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "notes").write_text("mine")
    assert snapshot(tmp_path) == {"a": None, "a/run": None, "a/run/notes": b"mine"}
