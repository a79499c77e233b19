"""A full disk, and one that cannot be written: said in a sentence, and no checkpoint is harmed."""

import contextlib
import subprocess
import time
from pathlib import Path

import pytest
from programs import TINY, arrays, call, program, read_lines, same_bits, snapshot

from gpt import checkpoint
from gpt.presets import PRESETS
from gpt.training import saving, train_step
from gpt.training.metrics import RunLog


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
    assert checkpoint.steps(disk / "run") == [4, 8]
    until = time.monotonic() + 60
    while left(disk / "run") != {"4", "8"} and time.monotonic() < until:
        time.sleep(0.1)  # a slow thread of orbax's may still be at the half that it gave up
    assert left(disk / "run") == {"4", "8"}
    mount("-o", "remount,size=64m", disk)
    assert call("train", *argv).code == 0
    assert same_bits(arrays(disk / "run", 12), arrays(trained[1], 12))
    assert read_lines(disk / "run") == read_lines(trained[1])


def left(run) -> set[str]:
    """What lies among a run's checkpoints."""
    return {path.name for path in (run / "checkpoints").iterdir()}


def fill(disk) -> None:
    """Leave no room."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_who_goes_on_unsaved_has_what_could_be_saved(text, trained, mounted, monkeypatch):
    """The disk is full from the sample at step 7 until the save of step 8 is seen to have failed,
    which is at the next."""
    disk = mounted(64 * 1024)
    Run, Writer = program("train").Run, checkpoint.Writer
    sample, wait = Run.show_sample, Writer.wait

    def full_from_here(run, *arguments):
        run.writer.wait()  # on a busy machine step 4 may still be on its way to the disk
        fill(disk)
        sample(run, *arguments)

    def free_from_here(writer):
        failing = writer.latest == 8 and writer.pending is not None
        try:
            wait(writer)
        finally:
            if failing:
                (disk / "ballast").unlink()

    monkeypatch.setattr(Run, "show_sample", full_from_here)
    monkeypatch.setattr(Writer, "wait", free_from_here)
    argv = [*TINY, "--data", text, "--out", disk / "run", "--keep-going"]
    argv[argv.index("--sample-every") + 1] = "7"
    monkeypatch.setattr(Run, "due", due_until_ten(Run.due))
    done = call("train", *argv)
    assert done.code == 0, done.err
    assert "the checkpoint of step 8 could not be saved" in done.err
    assert "the last good one is step 4" in done.err and "training goes on" in done.err
    assert checkpoint.steps(disk / "run") == [4, 12]
    assert same_bits(arrays(disk / "run", 12), arrays(trained[1], 12))
    assert all(line in read_lines(trained[1]) for line in read_lines(disk / "run"))


def due_until_ten(honest):
    """No sample at the end of the run: the disk is to stay free."""

    def due(self, done, *intervals):
        return honest(self, done, *intervals) and (done < 12 or intervals != (7,))

    return due


def test_a_line_that_finds_no_room_leaves_no_half(tmp_path, monkeypatch):
    """As /dev/full has none."""
    from rich.console import Console

    from gpt.config import TrainConfig

    class Full:
        name = "metrics.jsonl"
        written = b""

        def seek(self, *_):
            return len(self.written)

        def write(self, line):
            self.written += line[:5]
            return 5

        def truncate(self, end):
            self.written = self.written[:end]

        def close(self):
            pass

    for going_on in (False, True):
        config = TrainConfig(log_every=1, keep_going=going_on)
        with RunLog(tmp_path / "metrics.jsonl", 0, config, Console(quiet=True)) as log:
            log.file.close()
            log.file = Full()
            told = contextlib.nullcontext() if going_on else pytest.raises(OSError, match="metrics")
            with told:
                log.log_train(1, {"loss": 1.0, "skipped": 0})
            assert log.file.written == b""


def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(text, trained, mounted):
    disk = mounted(64 * 1024)
    done = call("train", *TINY, "--steps", "12", "--data", text, "--out", disk / "run")
    assert done.code == 0
    before = snapshot(disk)
    mount("-o", "remount,ro", disk)
    for out, more in ((disk / "run", ()), (disk / "run", ("--overwrite",)), (disk / "new", ())):
        done = call("train", *TINY, "--data", text, "--out", out, *more)
        assert done.code == 2 and done.err.count("\n") == 1
        assert f"error: --out {out} cannot be used" in done.err
        assert "not a folder that you may write to" in done.err
    assert snapshot(disk) == before


def test_after_a_save_that_failed_the_next_one_is_tried_and_waited_for(monkeypatch):
    """The disk may have room again: the work since then is not thrown away."""
    told, saved = [], []

    class Full:
        failed = False

        def wait(self):
            self.failed = True
            raise checkpoint.Unsaved("the checkpoint of step 10 could not be saved")

        def save(self, step, trees, about, *, loss, wait):
            saved.append((step, wait))

    monkeypatch.setattr(train_step, "stored", lambda state: {})
    saving.save(Full(), PRESETS["tiny"], 20, None, {}, None, False, told.append)
    assert saved == [(20, True)] and "step 10 could not be saved" in told[0]
