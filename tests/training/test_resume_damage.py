"""A run whose newest checkpoint is damaged continues from the one before, and says why."""

import numpy as np
import pytest
from programs import TINY, arrays, call, read_lines, same_bits

from gpt import checkpoint, sharding
from gpt.config import TrainConfig, from_json
from gpt.training import resume, train_state


def damages(data: bytes, random: np.random.Generator):
    """The file deleted, cut short, and with one bit flipped."""
    flipped = bytearray(data)
    flipped[random.integers(len(data))] ^= 1 << random.integers(8)
    return None, data[: len(data) // 2], bytes(flipped)


@pytest.mark.slow
def test_each_file_damaged_falls_back_or_changes_nothing(finished):
    """The whole state of the run, weights and optimizer, as it is loaded to continue."""
    config = from_json(TrainConfig, checkpoint.read_metadata(finished, 12)["train"])
    like = train_state.abstract_state(config, sharding.make_mesh(config.mesh))
    good, outcomes = arrays(finished, 12), []
    random = np.random.default_rng(0)

    def load(folder, step):
        return step, resume.load_state(like, folder, step)

    for path in sorted(p for p in checkpoint.step_dir(finished, 12).rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for data in damages(whole, random):
            path.unlink() if data is None else path.write_bytes(data)
            notes = []
            step, _ = resume.newest(finished, load, notes.append)
            with checkpoint.CheckpointManager(finished, 5, 5, resumed=step):
                pass  # whatever it looks at
            if step == 12:
                assert not notes and same_bits(arrays(finished, 12), good), path
            else:
                (note,) = notes
                assert step == 8 and "checkpoints/12" in note and "an earlier" in note
            outcomes.append(step)
            path.write_bytes(whole)
    assert outcomes.count(8) > 20 and len(outcomes) > 40


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
    done = call("train", *TINY, "--data", text, "--out", finished)
    assert done.code == 0, done.err
    assert done.err.count("note: ") == 1 and "an earlier checkpoint is used" in done.err
    assert same_bits(arrays(finished, 12), arrays(trained[1], 12))
    assert read_lines(finished) == read_lines(trained[1])


def test_a_run_of_which_nothing_is_whole_is_one_error(text, finished):
    for step in (8, 12):
        (checkpoint.step_dir(finished, step) / "_CHECKPOINT_METADATA").unlink()
    done = call("train", *TINY, "--data", text, "--out", finished)
    assert done.code == 2 and done.err.count("error: ") == 1
    assert "is whole: " in done.err and "checkpoints/8" in done.err
