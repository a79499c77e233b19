"""A run whose newest checkpoint is damaged continues from the one before, and says why."""

import shutil

import numpy as np
import pytest
from programs import TINY, arrays, call, read_lines, same_bits

from gpt import checkpoint, sharding
from gpt.config import TrainConfig, from_json
from gpt.training import resume, run_dir, train_state

# pytest undoes the filter that keeps this out of the terminal elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def damages(data: bytes, random: np.random.Generator):
    """The file deleted, cut short, and with one bit flipped."""
    flipped = bytearray(data)
    flipped[random.integers(len(data))] ^= 1 << random.integers(8)
    return None, data[: len(data) // 2], bytes(flipped)


@pytest.mark.slow
def test_each_file_damaged_falls_back_or_changes_nothing(trained, tmp_path):
    """The whole state of the run, weights and optimizer, as it is loaded to continue."""
    run = shutil.copytree(trained[1], tmp_path / "run")
    config = from_json(TrainConfig, checkpoint.read_metadata(run, 12)["train"])
    like = train_state.abstract_state(config, sharding.make_mesh(config.mesh))
    good, outcomes = arrays(run, 12), []
    random, notes = np.random.default_rng(0), []

    def load(folder, at):
        return at, resume._load_state(like, folder, at)

    for path in sorted(p for p in checkpoint.step_dir(run, 12).rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for data in damages(whole, random):
            path.unlink() if data is None else path.write_bytes(data)
            notes.clear()
            at, _ = resume.newest(run, load, notes.append)
            with checkpoint.CheckpointManager(run, 5, 5, resumed=at):
                pass  # whatever it looks at
            if at == 12:
                assert not notes and same_bits(arrays(run, 12), good), path
            else:
                (note,) = notes
                assert at == 8 and "checkpoints/12" in note and "an earlier" in note
            outcomes.append(at)
            path.write_bytes(whole)
    assert outcomes.count(8) > 20 and len(outcomes) > 40


@pytest.mark.parametrize(
    "tree", ["params", pytest.param("optimizer", marks=pytest.mark.slow), None]
)
def test_the_same_command_ends_where_it_would_have(tree, text, trained, tmp_path):
    """What is told is told once, wherever the damage is met."""
    run = shutil.copytree(trained[1], tmp_path / "run")
    place = checkpoint.step_dir(run, 12)
    files = [place / "_CHECKPOINT_METADATA"]
    if tree:
        files = [p for p in (place / tree).rglob("*") if p.is_file() and p.parent.name == "d"]
    for path in files:
        path.write_bytes(path.read_bytes()[::-1])
    done = call("train", *TINY, "--data", text, "--out", run)
    assert done.code == 0, done.err
    assert done.err.count("note: ") == 1 and "an earlier checkpoint is used" in done.err
    assert same_bits(arrays(run, 12), arrays(trained[1], 12))
    assert read_lines(run) == read_lines(trained[1])


def test_overwriting_a_checkpoint_that_is_a_link_leaves_what_it_points_to(finished, tmp_path):
    place = finished / "checkpoints" / "8"
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    run_dir.remove_run(finished)
    assert not place.exists() and (tmp_path / "elsewhere").is_dir()
    assert checkpoint.steps(finished) == []
