"""Damaged checkpoints are refused by name, or nothing has changed: never a silent difference."""

import sys
from collections import Counter

import numpy as np
import pytest
from trees import (
    METADATA,
    abstract,
    files_of,
    largest_data_file,
    newest_metadata,
    params,
    run_python,
    same_bits,
    state,
)

from gpt import checkpoint
from gpt.checkpoint import Damaged, Unsaved, Writer
from gpt.errors import UserError

# pytest undoes the filter that keeps this out of the terminal elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def change_a_digit(folder, step):
    path = checkpoint.place_of(folder, step) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("0.1", "0.2"))


def test_a_changed_digit_in_the_metadata_is_seen(mine):
    change_a_digit(mine, 2)
    with pytest.raises(Damaged, match=r"checkpoints/2 is damaged: its metadata"):
        checkpoint.read_metadata(mine, 2)


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_one_named(mine):
    change_a_digit(mine, 2)
    step, metadata, damaged = newest_metadata(mine)
    assert (step, metadata["step"]) == (1, 1)
    assert len(damaged) == 1 and "checkpoints/2 is damaged" in damaged[0]
    change_a_digit(mine, 1)
    with pytest.raises(UserError, match=r"is whole: .*checkpoints/2 .*checkpoints/1 "):
        newest_metadata(mine)


def test_a_failure_that_is_no_damage_is_not_passed_over(saved):
    def load(step):
        raise UserError("another version")

    with pytest.raises(UserError, match=r"^another version$"):
        checkpoint.latest_good(saved, load)


def damaged_variants(data: bytes, flips: int, random: np.random.Generator):
    """The file deleted, emptied, cut in half, and with one bit flipped, `flips` times."""
    yield None
    yield b""
    yield data[: len(data) // 2]
    for _ in range(flips):
        flipped = bytearray(data)
        flipped[random.integers(len(data))] ^= 1 << random.integers(8)
        yield bytes(flipped)


def outcomes_of_damage(folder, step: int, flips: int) -> Counter:
    """Damage every file of a checkpoint in turn: each tree is refused by name or unchanged."""
    random, outcomes = np.random.default_rng(0), Counter()
    names = checkpoint.read_record(folder, step)["arrays"]
    for path in files_of(folder, step):
        whole = path.read_bytes()
        for data in damaged_variants(whole, flips, random):
            path.unlink() if data is None else path.write_bytes(data)
            for name in names:
                outcomes[outcome(folder, step, name)] += 1
            path.write_bytes(whole)
    return outcomes


def outcome(folder, step: int, name: str) -> str:
    expected = state(step)[name]
    try:
        metadata = checkpoint.read_metadata(folder, step)
        restored = checkpoint.restore(folder, step, name, abstract(expected))
    except Damaged as error:
        assert f"checkpoints/{step}" in str(error)
        return "refused"
    unchanged = metadata == METADATA | {"step": step} and same_bits(restored, expected)
    return "harmless" if unchanged else "silent"


def test_no_damage_changes_an_array_in_silence(tmp_path):
    with Writer(tmp_path, keep=1) as writer:
        writer.save(2, {"params": params(2)}, METADATA | {"step": 2})
    outcomes = outcomes_of_damage(tmp_path, 2, flips=2)
    assert set(outcomes) == {"refused", "harmless"} and outcomes["refused"] > 10


@pytest.mark.slow
def test_no_damage_changes_an_array_in_silence_however_often(mine):
    assert set(outcomes_of_damage(mine, 2, flips=20)) == {"refused", "harmless"}


def test_a_flipped_bit_in_the_weights_names_the_array(mine):
    path = largest_data_file(mine, 2)
    data = bytearray(path.read_bytes())
    at = data.find(np.asarray(params(2)["blocks"]["q"]).tobytes()[:8])  # stored as it is, if found
    data[at if at >= 0 else len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"2/params is damaged: blocks/q: not what was saved"):
        checkpoint.restore(mine, 2, "params", abstract(params()))


QUIET = """
import sys
sys.path.insert(0, "tests/checkpoint")
import trees as t
from gpt import checkpoint

folder = sys.argv[1]
t.save(folder, 1, 2, 3, keep=2)
for path in t.files_of(folder, 3):  # each makes orbax stumble at another place
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b""):
        path.write_bytes(data)
        step, _, damaged = checkpoint.latest_good(folder, lambda s: t.restore_all(folder, s))
        assert step == 3 - len(damaged), (step, damaged)
    path.write_bytes(whole)
"""


def test_orbax_reaches_the_terminal_neither_in_success_nor_in_damage(tmp_path):
    done = run_python(QUIET, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FULL = """
import os, resource, signal, sys
import jax
from gpt import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trees = {"params": {"x": jax.random.normal(jax.random.key(0), (300, 1000))}}
with checkpoint.Writer(sys.argv[1], keep=1) as writer:
    writer.save(1, trees, {}, wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    for step in (2, 3):
        try:
            writer.save(step, trees, {}, wait=True)
        except checkpoint.Unsaved as error:
            assert f"step {step} could not be saved" in str(error), error
            assert "the last good one is step 1" in str(error), error
    assert os.listdir(sys.argv[1] + "/checkpoints") == ["1"]  # the room is free again
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    os.mkdir(sys.argv[1] + "/checkpoints/2.orbax-checkpoint-tmp")  # a slow thread of that save
    writer.save(3, trees, {})
assert os.listdir(sys.argv[1] + "/checkpoints") == ["3"]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_write_that_fails_is_told_and_harms_nothing(tmp_path):
    assert issubclass(Unsaved, UserError)
    done = run_python(FULL, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
