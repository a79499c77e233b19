"""Checkpoints that ask for the absurd: both programs refuse them in a sentence, at once."""

import json
import shutil

import pytest
from programs import TINY, call

from gpt import checkpoint
from gpt.checkpoint.record import seal
from gpt.config import ModelConfig, from_json
from gpt.model import transformer


@pytest.fixture
def forged(trained, tmp_path):
    """Have a run whose checkpoint says something else, with digests that are right: its folder."""

    def forge(metadata=None, arrays=None):
        run = shutil.copytree(trained[1], tmp_path / "run")
        shutil.rmtree(checkpoint.place_of(run, 8))
        path = checkpoint.place_of(run, 12) / "_CHECKPOINT_METADATA"
        outer = json.loads(path.read_text())
        record = outer["custom_metadata"]
        del record["sha256"]
        record["metadata"] |= metadata or {}
        record["arrays"] |= arrays or {}
        path.write_text(json.dumps(outer | {"custom_metadata": seal(record)}))
        return run

    return forge


def refused(done, *words):
    error = done.err[done.err.index("error: ") :]
    assert done.code == 2 and "Traceback" not in done.err
    assert all(word in error for word in words), error
    return True


def test_a_model_of_a_quadrillion_parameters(trained, forged, text, tmp_path):
    saved = checkpoint.read_metadata(trained[1], 12)["model"]
    absurd = saved | {"n_layers": 10**7, "d_model": 10**4}
    shapes = transformer.abstract(from_json(ModelConfig, absurd).computing_in("float32"))
    params = {
        name: {"shape": list(x.shape), "dtype": "float32", "digest": 0}
        for name, x in checkpoint.named_leaves(shapes).items()
    }
    run = forged({"model": absurd}, {"params": params})
    assert refused(call("sample", run, "--max-new-tokens", "1"), "GiB", "do not trust")
    argv = [*TINY, "--data", text, "--out", tmp_path / "new", "--init-from", run]
    assert refused(call("train", *argv), "does not fit", "blocks/")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"model": {"n_layers": 3}}, "does not fit this configuration"),
        ({"model": {"n_layers": "3"}}, "ModelConfig.n_layers is '3'"),
        ({"model": None}, "ModelConfig: expected a JSON object"),
        ({"tokenizer": {"pattern": "(?!)"}}, "the saved tokenizer cannot be used"),
        ({"train": {"ema_decay": "all"}}, "ema_decay"),
    ],
)
def test_what_a_checkpoint_says_is_not_trusted(metadata, words, forged):
    run = forged(metadata)
    assert refused(call("sample", run, "--max-new-tokens", "1"), words)


@pytest.mark.parametrize("name", ["model", "train", "tokenizer", "data", "step"])
@pytest.mark.parametrize("value", [None, 7, "x", [], {}])
def test_a_run_with_parts_of_another_kind_does_not_continue(name, value, forged, text):
    run = forged({name: value})
    done = call("train", *TINY, "--data", text, "--out", run)
    assert "Traceback" not in done.err
    assert name == "model" or (name, value) in (("train", {}), ("step", 7)) or refused(done)
