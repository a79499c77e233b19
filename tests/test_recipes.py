"""The training choices through the programs: averages, schedules to lengthen, resumes."""

import shutil

import numpy as np
import pytest
from programs import SHAPE, arrays, call, same_bits, stored_shapes

from gpt import checkpoint
from gpt.sampling.language_model import load

MORE = [
    *SHAPE,
    *("--warmup-steps", "2", "--log-every", "1", "--save-every", "6", "--sample-every", "0"),
    *("--optimizer", "muon", "--schedule", "wsd", "--ema-decay", "0.9", "--label-smoothing", "0.1"),
    *("--z-loss", "1e-4", "--model.positions", "rope", "--model.norm", "rms", "--model.qk-norm"),
]


@pytest.fixture(scope="module")
def modern(text, tmp_path_factory):
    """A run of twelve steps with every training choice of today."""
    folder = tmp_path_factory.mktemp("modern") / "run"
    done = call("train", *MORE, "--steps", "12", "--data", text, "--out", folder)
    assert done.code == 0, done.err
    return folder


def averages(folder, step):
    shapes = stored_shapes(folder, step, "ema_params")
    return checkpoint.restore(folder, step, "ema_params", shapes)


@pytest.mark.exact
def test_resumed_equals_uninterrupted(modern, text, tmp_path):
    """Muon's momentum and the average too, to the bit."""
    again = shutil.copytree(modern, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / "12")
    done = call("train", *MORE, "--steps", "12", "--data", text, "--out", again)
    assert done.code == 0, done.err
    assert same_bits(arrays(modern, 12), arrays(again, 12))
    for name, average in averages(modern, 12).items():
        assert np.array_equal(average, averages(again, 12)[name]), name


@pytest.mark.exact
def test_the_average_is_what_is_sampled_and_scored(modern):
    kept, last = load(modern), load(modern, weights="raw")
    assert kept.weights == "ema" and last.weights == "raw"
    assert np.array_equal(kept.params["tokens"], averages(modern, 12)["tokens"])
    assert not np.array_equal(kept.params["tokens"], last.params["tokens"])
    for flags, said in (([], True), (["--weights", "raw"], False)):
        done = call("sample", modern, "--prompt", "the", "--max-new-tokens", "3", *flags)
        assert ("averaged weights" in done.err) == said


def test_an_average_that_was_not_kept_is_refused(trained):
    done = call("sample", trained[1], "--weights", "ema")
    assert done.code == 2 and "keeps no average" in done.err


@pytest.mark.exact  # a longer run has a program of its own, which must round as this one's does
def test_wsd_may_be_lengthened_before_it_falls_and_not_after(modern, text, tmp_path):
    """The longer run from the start and the lengthened one end with the same bits."""
    again = shutil.copytree(modern, tmp_path / "again")
    refused = call("train", *MORE, "--steps", "18", "--data", text, "--out", again)
    assert refused.code == 2 and "steps: the run has 12, you asked for 18" in refused.err
    shutil.rmtree(again / "checkpoints" / "12")
    done = call("train", *MORE, "--steps", "18", "--data", text, "--out", again)
    assert done.code == 0, done.err
    straight = tmp_path / "straight"
    call("train", *MORE, "--steps", "18", "--data", text, "--out", straight)
    assert same_bits(arrays(straight, 18), arrays(again, 18))
