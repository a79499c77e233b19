"""train.py --init-from: starting from another run."""

import shutil

import numpy as np
from programs import (
    TINY,
    arrays,
    call,
    snapshot,
    write_text,
)

from gpt import checkpoint
from gpt.data import tokenizers


def test_init_from_takes_weights_and_tokenizer(trained, tmp_path):
    still = [
        "--learning-rate",
        "1e-30",
        "--muon-learning-rate",
        "1e-30",
        "--min-learning-rate",
        "0",
        "--steps",
        "1",
    ]
    argv = [*TINY, *still, "--tokenizer", "char", "--data", write_text(tmp_path / "t", seed=2)]
    done = call("train", *argv, "--init-from", trained[1], "--out", tmp_path / "run")
    assert done.code == 0, done.err
    mine, source = arrays(tmp_path / "run", 1), arrays(trained[1], 12)
    weights = [name for name in source if name.startswith("params/")]
    assert weights and all(np.allclose(mine[k], source[k], atol=1e-20, rtol=0) for k in weights)
    assert int(mine["optimizer/step"]) == 1
    assert tokenizers.load(tmp_path / "run" / "tokenizer.json").name == "byte"


def test_a_run_continued_without_the_flag_remembers_what_it_began_from(text, trained, tmp_path):
    argv = [*TINY, "--data", text, "--out", tmp_path / "run"]
    assert call("train", *argv, "--init-from", trained[1]).code == 0
    shutil.rmtree(checkpoint.step_dir(tmp_path / "run", 12))
    done = call("train", *argv)
    assert done.code == 0 and "continues" in done.err, done.err
    assert checkpoint.read_metadata(tmp_path / "run", 12)["init_from"] == str(trained[1])


def test_init_from_another_shape_lists_the_shapes(text, trained, tmp_path):
    argv = [*TINY, "--model.d-model", "32", "--data", text, "--init-from", trained[1]]
    done = call("train", *argv, "--out", tmp_path / "run")
    assert done.code == 2
    assert "\n  tokens: stored (384, 16), expected (384, 32)\n" in done.err
    assert "\n  blocks/" in done.err
    assert snapshot(tmp_path) == {}
