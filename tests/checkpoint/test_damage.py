"""A damaged checkpoint is passed over by name, or nothing has changed: never in silence."""

import os
import sys

import numpy as np
import pytest
from trees import METADATA, abstract, files_of, newest_metadata, params, run_python, same_bits, save

from gpt import checkpoint
from gpt.checkpoint import FORMAT, CheckpointManager, Damaged, SaveFailed
from gpt.errors import UserError


def change_a_digit(folder, step):
    path = checkpoint.step_dir(folder, step) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("0.1", "0.2"))


def damages(data: bytes, flips: int, random: np.random.Generator):
    """The file deleted, cut in half, and with one bit flipped, `flips` times."""
    yield None
    yield data[: len(data) // 2]
    for _ in range(flips):
        flipped = bytearray(data)
        flipped[random.integers(len(data))] ^= 1 << random.integers(8)
        yield bytes(flipped)


@pytest.mark.parametrize("flips", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_any_damage_to_the_newest_falls_back_or_changes_nothing(flips, tmp_path):
    with CheckpointManager(tmp_path, keep=2) as manager:
        for step in (1, 2):
            manager.save(step, {"params": params(step)}, METADATA | {"step": step})

    def load(step):
        restored = checkpoint.restore(tmp_path, step, "params", abstract(params()))
        return checkpoint.read_metadata(tmp_path, step), restored

    random, fallbacks = np.random.default_rng(0), 0
    for path in files_of(tmp_path, 2):
        whole = path.read_bytes()
        for data in damages(whole, flips, random):
            path.unlink() if data is None else path.write_bytes(data)
            step, (metadata, restored), notes = checkpoint.latest_good(tmp_path, load)
            assert metadata == METADATA | {"step": step} and same_bits(restored, params(step))
            assert len(notes) == 2 - step and all("checkpoints/2" in note for note in notes)
            fallbacks += step == 1
        path.write_bytes(whole)
    assert fallbacks > 10


def test_if_all_are_damaged_one_error_names_each(mine):
    change_a_digit(mine, 2)
    step, _, notes = newest_metadata(mine)
    assert step == 1 and len(notes) == 1
    assert "checkpoints/2 is damaged: its metadata differ from their digest" in notes[0]
    change_a_digit(mine, 1)
    with pytest.raises(UserError, match=r"is whole: .*checkpoints/2 .*checkpoints/1 "):
        newest_metadata(mine)


def test_a_flipped_bit_in_the_weights_names_the_array(mine):
    data_files = [path for path in files_of(mine, 2) if "params/ocdbt.process_0/d" in str(path)]
    path = max(data_files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    at = data.find(np.asarray(params(2)["blocks"]["q"]).tobytes()[:8])  # stored as it is, if found
    data[at if at >= 0 else len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"2/params is damaged: blocks/q: not what was saved"):
        checkpoint.restore(mine, 2, "params", abstract(params()))


def test_an_error_that_is_no_damage_is_not_passed_over(saved):
    def load(step):
        raise UserError("another model")

    with pytest.raises(UserError, match=r"^another model$"):
        checkpoint.latest_good(saved, load)


def test_a_renamed_step_is_not_taken_for_another(mine):
    checkpoint.step_dir(mine, 2).rename(checkpoint.step_dir(mine, 100))
    with pytest.raises(Damaged, match="it was saved as step 2"):
        checkpoint.read_metadata(mine, 100)


@pytest.mark.parametrize(
    ("version", "maker"), [(FORMAT - 1, "an earlier version"), (FORMAT + 1, "a later version")]
)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(version, maker, mine, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", version)
    save(mine, 3)
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"checkpoints/3 was made by {maker} of this") as caught:
        newest_metadata(mine)
    assert "\n" not in str(caught.value)


# What orbax does besides raising


QUIET = """
import logging, sys, warnings
sys.path.insert(0, "tests/checkpoint")
import jax, orbax.checkpoint.experimental.v1
def outside():
    loggers = [logging.getLogger(name) for name in (None, "absl", "asyncio")]
    return list(warnings.filters), [(x.level, x.handlers) for x in loggers]
before, hook = outside(), sys.unraisablehook
import trees as t
from gpt import checkpoint
assert outside() == before and sys.unraisablehook is hook

folder = sys.argv[1]
t.save(folder, 1, 2, 3, keep=2)
for name in ("opt/_METADATA", "params/manifest.ocdbt"):  # orbax fails early, or among many reads
    path = checkpoint.step_dir(folder, 3) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    step, _, damaged = checkpoint.latest_good(folder, lambda s: t.restore_all(folder, s))
    assert step == 2 and len(damaged) == 1, (step, damaged)
    path.write_bytes(whole)
assert outside() == before
"""


def test_orbax_reaches_the_terminal_neither_in_success_nor_in_damage(tmp_path):
    """And nothing that belongs to others is changed: filters, levels, handlers."""
    done = run_python(QUIET, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# A save that fails, and one that is killed

FULL = """
import os, resource, signal, sys, time
import jax
from gpt import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trees = {"params": {"x": jax.random.normal(jax.random.key(0), (300, 1000))}}
with checkpoint.CheckpointManager(sys.argv[1], keep=1) as manager:
    manager.save(1, trees, {}, wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    for step in (2, 3):
        try:
            manager.save(step, trees, {})
            time.sleep(0.5)  # for threads in the background to log what they meet
            manager.wait()
        except checkpoint.SaveFailed as error:
            assert f"step {step} could not be saved" in str(error), error
            assert "the last good one is step 1" in str(error), error
        else:
            raise SystemExit("a save without room succeeded")
    assert os.listdir(sys.argv[1] + "/checkpoints") == ["1"]  # the room is free again
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    os.mkdir(sys.argv[1] + "/checkpoints/2.orbax-checkpoint-tmp")  # a slow thread of that save
    manager.save(3, trees, {}, wait=True)
    assert os.listdir(sys.argv[1] + "/checkpoints") == ["3"]
    manager.save(4, trees, {})
    sys.stdout.flush()
    os._exit(9)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_save_that_fails_or_is_killed_harms_nothing_and_leaves_nothing(tmp_path):
    assert issubclass(SaveFailed, UserError)
    done = run_python(FULL, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (9, "", "")

    # Killed in the middle of a save; as it may have been quick, a partly written one is made sure.
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    killed = checkpoint.steps(tmp_path)
    assert killed in ([3], [4], [3, 4])
    assert newest_metadata(tmp_path)[::2] == (killed[-1], [])
    save(tmp_path, 6)
    assert set(os.listdir(tmp_path / "checkpoints")) == {*map(str, killed), "6"}
