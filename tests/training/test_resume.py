"""What may stand in the way of a run: damage, another trainer, a disk that is full or read-only. It
is said in a sentence, and no checkpoint is harmed."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, TINY, arrays, call, read_lines, same_bits, snapshot, succeed

from gpt import checkpoint
from gpt.errors import UserError
from gpt.training import run_dir

# A newest checkpoint that is damaged.


@pytest.mark.parametrize(
    "tree", ["params", None, pytest.param("optimizer", marks=pytest.mark.slow)]
)
def test_the_same_command_ends_where_it_would_have(tree, text, trained, finished):
    """The damage is told once, wherever it is met: in the arrays, or in what is said of them."""
    folder = checkpoint.step_dir(finished, 12)
    files = [folder / "_CHECKPOINT_METADATA"]
    if tree:
        files = [p for p in (folder / tree).rglob("*") if p.is_file() and p.parent.name == "d"]
    for path in files:
        path.write_bytes(path.read_bytes()[::-1])
    done = succeed("train", *TINY, "--data", text, "--out", finished)
    assert done.err.count("note: ") == 1 and "an earlier checkpoint is used" in done.err
    assert same_bits(arrays(finished, 12), arrays(trained[1], 12))
    assert read_lines(finished) == read_lines(trained[1])


# Another trainer.

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
                f"error: another train.py is using {run}: wait for it, stop it, or choose "
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
        with pytest.raises(UserError, match="is using"), run_dir.lock_run(run):
            pass
        run_dir.remove_run(run)  # as with --overwrite: the lock is not a file of the run
        with pytest.raises(UserError, match="is using"), run_dir.lock_run(run):
            pass
    assert snapshot(tmp_path) == {}  # the folders that were made for it are gone
    with run_dir.lock_run(run):
        (run / "notes").write_text("mine")
    assert snapshot(tmp_path) == {"a": None, "a/run": None, "a/run/notes": b"mine"}


# A full disk, and one that cannot be written.


def mount(*words) -> None:
    """A mount as the administrator makes it; the test is skipped where that is not allowed."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def mounted(tmp_path):
    """Have a file system of so many KiB in a folder, which is returned."""
    place = tmp_path / "mounted"
    place.mkdir()

    def small(kibibytes: int) -> Path:
        mount("-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", place)
        return place

    yield small
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def size(folder) -> int:
    """KiB below a folder, in pages as tmpfs counts them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4 for path in files)


def test_a_full_disk_stops_the_run_and_harms_no_checkpoint(text, trained, mounted):
    """Room for two checkpoints and a half; it was asked to keep them all."""
    disk = mounted(size(trained[1] / "checkpoints") // 2 * 5 // 2 + 100)
    argv = [*TINY, "--keep", "9", "--data", text, "--out", disk / "run"]
    done = call("train", *argv)
    assert done.code == 2 and "Traceback" not in done.err
    error = done.err[done.err.index("error: ") :]
    assert "the checkpoint of step 12 could not be saved" in error and error.count("\n") == 1
    assert "the last good one is step 8" in error and "--keep-going" in error
    assert checkpoint.saved_steps(disk / "run") == [4, 8]
    mount("-o", "remount,size=64m", disk)
    succeed("train", *argv)
    assert {path.name for path in (disk / "run/checkpoints").iterdir()} == {"4", "8", "12"}
    assert same_bits(arrays(disk / "run", 12), arrays(trained[1], 12))
    assert read_lines(disk / "run") == read_lines(trained[1])


def test_a_disk_too_small_for_one_checkpoint_is_found_out_before_the_first_step(
    text, trained, mounted
):
    disk = mounted(size(trained[1] / "checkpoints") // 4)
    done = call("train", *TINY, "--data", text, "--out", disk / "run")
    assert done.code == 2
    assert "error: the checkpoint of step 0 could not be saved" in done.err
    assert "no earlier checkpoint exists" in done.err and "validation" not in done.err
    assert not read_lines(disk / "run")


def test_who_goes_on_unsaved_has_what_could_be_saved(text, trained, mounted, monkeypatch):
    """The disk is full when step 8 is saved, until the next save notices that this one failed."""
    disk = mounted(64 * 1024)
    honest_save, honest_wait = checkpoint.CheckpointManager.save, checkpoint.CheckpointManager.wait

    def save(writer, step, *arguments, **named):
        if step == 8:
            writer.wait()  # on a busy machine step 4 may still be on its way to the disk
            with contextlib.suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        honest_save(writer, step, *arguments, **named)

    def wait(writer):
        failing = writer.latest == 8 and (disk / "full").exists()
        try:
            honest_wait(writer)
        finally:
            if failing:
                (disk / "full").unlink()

    monkeypatch.setattr(checkpoint.CheckpointManager, "save", save)
    monkeypatch.setattr(checkpoint.CheckpointManager, "wait", wait)
    argv = [*TINY, "--data", text, "--out", disk / "run", "--keep-going"]
    done = succeed("train", *argv)
    assert "the checkpoint of step 8 could not be saved" in done.err
    assert "the last good one is step 4" in done.err and "training continues" in done.err
    assert checkpoint.saved_steps(disk / "run") == [4, 12]
    assert same_bits(arrays(disk / "run", 12), arrays(trained[1], 12))
    assert all(line in read_lines(trained[1]) for line in read_lines(disk / "run"))


def test_a_background_save_that_failed_is_noted_and_the_next_one_waited_for(
    text, tmp_path, monkeypatch
):
    """The disk may have room again: the work since then is not thrown away."""
    honest, waited = checkpoint.CheckpointManager.save, {}

    def save(writer, step, trees, metadata, *, loss=None, wait=False):
        waited[step] = wait
        honest(writer, step, trees, metadata, loss=loss, wait=wait)
        if step == 4:
            writer.failed = True

    monkeypatch.setattr(checkpoint.CheckpointManager, "save", save)
    succeed("train", *TINY, "--data", text, "--out", tmp_path / "run")
    assert waited == {0: True, 4: False, 8: True, 12: True}
