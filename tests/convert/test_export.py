"""Runs of ours going out: the function that was trained, under the names that transformers has."""

import dataclasses
import json

import jax
import numpy as np
import numpy_transformer
import pytest
import standins
from programs import call
from safetensors.numpy import load_file

from gpt import checkpoint
from gpt.config import ModelConfig, TrainConfig, to_json
from gpt.convert import convert, hf_weights
from gpt.convert.hf_config import read_config, to_hf_config
from gpt.convert.hf_weights import GPT2
from gpt.data import tokenizers
from gpt.model import transformer

IDS = np.random.default_rng(0).integers(257, size=24)
SMALL = ModelConfig(257, context_length=64, n_layers=2, n_heads=2, d_model=16, d_ff=20)
MODERN = dataclasses.replace(SMALL, positions="rope", norm="rms", mlp="swiglu", bias=False)
OURS = {
    "gpt2": SMALL,
    "gpt2 without biases": dataclasses.replace(SMALL, bias=False, tied=False, mlp="relu2"),
    "gpt2 with some biases": dataclasses.replace(SMALL, bias=False, qkv_bias=True, norm_bias=True),
    "llama": dataclasses.replace(MODERN, n_kv_heads=1, tied=False),
    "llama, output biases alone": dataclasses.replace(MODERN, out_bias=True, d_head=6),
    "llama, stretched": dataclasses.replace(MODERN, rope_factor=4.0, rope_context=16),
    "qwen2": dataclasses.replace(MODERN, qkv_bias=True, d_head=MODERN.head_width),
    "qwen3": dataclasses.replace(MODERN, qk_norm=True, d_head=10),
    "qwen3, query biases": dataclasses.replace(MODERN, qk_norm=True, qkv_bias=True),
}


def random_weights(config, seed=0):
    """Weights far from their initial values."""
    rng = np.random.default_rng(seed)
    shapes = transformer.abstract(config)
    return jax.tree.map(
        lambda a: jax.device_put(rng.normal(0.1, 0.3, a.shape).astype(a.dtype)), shapes
    )


@pytest.mark.parametrize("name", OURS)
def test_the_function_that_goes_out_is_ours(name):
    """Against the independent form, which reads config.json and the tensors' names."""
    config = OURS[name]
    params = random_weights(config)
    values, family = to_hf_config(config)
    assert values["model_type"] == name.split()[0].rstrip(",")
    declared, _, _ = read_config(values)
    shapes = hf_weights.tensor_shapes(declared, family)
    tensors = hf_weights.to_tensors(declared, family, params, np.dtype(np.float32))
    weights = dict(zip(shapes, tensors, strict=True))
    if family is not GPT2:  # whose stand-in has an MLP of 4 x n_embd
        assert {n: w.shape for n, w in weights.items()} == standins.shapes(values)
    exact = standins.logits(values, weights, IDS)
    ours = numpy_transformer.forward(jax.device_get(params), IDS, config)
    assert np.abs(ours - exact).max() < 1e-5 * max(1, np.abs(exact).max())


def save(folder, config, trees=None, train=None):
    """A run's folder with a byte tokenizer, and its trees of weights."""
    about = {
        "model": to_json(config),
        "train": to_json(train or TrainConfig(model=config)),
        "tokenizer": tokenizers.to_json(tokenizers.create("byte", lambda: (), 0)),
        "step": 3,
    }
    trees = trees or {"params": random_weights(config)}
    with checkpoint.CheckpointManager(folder, keep=1) as writer:
        writer.save(3, trees, about, wait=True)
    return trees


def export(*argv):
    return call("gpt/convert/__main__", "export", *argv)


def test_the_average_goes_out_unless_the_last_weights_are_asked_for(tmp_path):
    train = TrainConfig(model=SMALL, ema_decay=0.9)
    trees = {"params": random_weights(SMALL, 1), "ema_params": random_weights(SMALL, 2)}
    save(tmp_path / "run", SMALL, trees, train)
    for flags, tree in (((), "ema_params"), (("--weights", "raw"), "params")):
        out = tmp_path / tree
        done = export(tmp_path / "run", out, *flags)
        assert (done.code, done.out) == (0, "") and "GPT2LMHeadModel in float32" in done.err
        table = load_file(out / "model.safetensors")["transformer.wte.weight"]
        assert np.array_equal(table, np.asarray(trees[tree]["tokens"])[:257])


def test_what_is_asked_for_in_vain(tmp_path):
    save(tmp_path / "run", SMALL)
    save(tmp_path / "formless", dataclasses.replace(SMALL, qk_norm=True))
    for argv, told in (
        (("run", "--weights", "ema"), "no average"),
        (("run", "--step", "7"), "step 7"),
        (("absent",), "no folder"),
        (("formless",), "error: transformers has no form for this model: GPT-2's needs"),
    ):
        done = export(tmp_path / argv[0], tmp_path / "out", *argv[1:])
        assert done.code == 2 and told in done.err and done.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["formless", "run"]


def test_the_folder_and_its_rights(tmp_path):
    """Not those of a temporary folder, which nobody else may read."""
    save(tmp_path / "run", SMALL)
    (tmp_path / "usual").mkdir()
    convert.export_model(tmp_path / "run", tmp_path / "deep/out", None, None, log=pytest.fail)
    assert (tmp_path / "deep/out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    files = {path.name: path.read_bytes() for path in (tmp_path / "deep/out").iterdir()}
    assert files.keys() == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    for name in ("config.json", "generation_config.json"):
        assert json.loads(files[name])["eos_token_id"] == 256
