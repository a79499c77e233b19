"""Runs of ours in the Hugging Face form: the tensors that came in, the function that was trained,
or the reason why there is no such form."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import standins
from programs import call
from safetensors.numpy import load_file

from gpt import checkpoint
from gpt.config import ModelConfig, TrainConfig, to_json
from gpt.convert import describe, fields, incoming
from gpt.data import tokenizers
from gpt.errors import UserError
from gpt.model import transformer

IDS = np.random.default_rng(0).integers(300, size=64)
SMALL = ModelConfig(257, context_length=64, n_layers=2, n_heads=2, d_model=16, d_ff=20)
MODERN = dataclasses.replace(SMALL, positions="rope", norm="rms", mlp="swiglu", bias=False)


def convert(*argv):
    return call("gpt/convert/__main__", *argv)


def weights_of(config, seed=0):
    """Weights far from their initial values."""
    rng = np.random.default_rng(seed)
    shapes = transformer.abstract(config)
    return jax.tree.map(lambda a: jax.numpy.asarray(rng.normal(0.1, 0.3, a.shape), a.dtype), shapes)


def save(folder, config, trees=None, train=None, letters=None):
    """A run's folder, with a byte tokenizer if there is none."""
    train = train or TrainConfig(model=config)
    about = {"model": to_json(config), "train": to_json(train), "step": 3}
    letters = letters or tokenizers.create("byte", lambda: (), 0)
    about["tokenizer"] = tokenizers.to_json(letters)
    trees = {"params": weights_of(config)} if trees is None else trees
    with checkpoint.Writer(folder, keep=1) as writer:
        writer.save(3, trees, about, wait=True)
    return trees


def bits(path):
    return {n: (str(a.dtype), a.shape, a.tobytes()) for n, a in load_file(path).items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "llama, biases", "qwen2", "qwen3"])
def test_what_came_in_goes_out_to_the_bit(kind, dtype, tmp_path):
    c = standins.KINDS[kind]
    weights = standins.tensors(c, dtype=dtype)
    folder = standins.write(tmp_path / "in", c, weights, parts=2)
    assert convert("import", folder, tmp_path / "run").code == 0
    assert convert("export", tmp_path / "run", tmp_path / "out").code == 0
    assert bits(tmp_path / "out/model.safetensors") == {
        name: (str(a.dtype), a.shape, a.tobytes()) for name, a in weights.items()
    }
    back = fields.read_config(json.loads((tmp_path / "out/config.json").read_text()))
    there = fields.read_config(c)
    assert back == there


def test_a_tokenizer_of_characters_comes_back(tmp_path):
    """Where the file is to the last field what we write: with another decoder it is another's."""
    letters = tokenizers.CharTokenizer("".join(sorted("\n abc今天'\"\\\u2028\U0001f600")))
    config = dataclasses.replace(SMALL, vocab_size=letters.n_vocab)
    save(tmp_path / "run", config, letters=letters)
    assert convert("export", tmp_path / "run", tmp_path / "out").code == 0
    done = convert("import", tmp_path / "out", tmp_path / "back")
    assert done.code == 0, done.err
    about = [checkpoint.read_metadata(tmp_path / name, i) for name, i in (("run", 3), ("back", 0))]
    assert about[0]["tokenizer"] == about[1]["tokenizer"]
    path = tmp_path / "out/tokenizer.json"
    path.write_text(path.read_text().replace('"Fuse"', '"WordPiece"'))
    done = convert("import", tmp_path / "out", tmp_path / "other")
    assert done.code == 2 and "the decoder is 'WordPiece'" in done.err
    path.write_text(path.read_text().replace('"WordPiece"', '"Fuse"').replace('"a"', '"\\ud800"'))
    done = convert("import", tmp_path / "out", tmp_path / "other")
    assert done.code == 2 and "error: " in done.err and "Traceback" not in done.err


OURS = {
    "gpt2": SMALL,
    "gpt2 without biases": dataclasses.replace(SMALL, bias=False, tied=False, mlp="relu2"),
    "gpt2 with some biases": dataclasses.replace(SMALL, bias=False, qkv_bias=True, norm_bias=True),
    "llama": dataclasses.replace(MODERN, n_kv_heads=1, tied=False),
    "llama, output biases alone": dataclasses.replace(MODERN, out_bias=True, d_head=6),
    "llama 3": dataclasses.replace(MODERN, rope_factor=4.0, rope_context=16),
    "qwen2": dataclasses.replace(MODERN, qkv_bias=True),
    "qwen2, its width of heads told": dataclasses.replace(
        MODERN, qkv_bias=True, d_head=MODERN.head_width
    ),
    "qwen3": dataclasses.replace(MODERN, qk_norm=True, d_head=10),
    "qwen3, query biases": dataclasses.replace(MODERN, qk_norm=True, qkv_bias=True),
}


@pytest.mark.parametrize("name", OURS)
def test_the_function_that_goes_out_is_ours(name, tmp_path):
    """Against the independent form, which reads config.json and the tensors' names."""
    config = OURS[name]
    trees = save(tmp_path / "run", config)
    done = convert("export", tmp_path / "run", tmp_path / "out")
    assert (done.code, done.out) == (0, ""), done.err
    c = json.loads((tmp_path / "out/config.json").read_text())
    assert c["eos_token_id"] == 256 and c["architectures"][0] in done.err
    assert c["model_type"] == name.split()[0].rstrip(",")
    ids = IDS % 257
    c["activation_function"] = {"gelu_new": "gelu_new"}.get(c.get("activation_function"), "relu2")
    exact = standins.logits(c, load_file(tmp_path / "out/model.safetensors"), ids)
    ours = np.asarray(transformer.forward(config, trees["params"], ids[None]))[0]
    assert np.abs(ours - exact).max() < 1e-5 * max(1, np.abs(exact).max())
    back, _ = incoming.open_source(tmp_path / "out")
    params = incoming.read_params(back)
    assert np.allclose(transformer.forward(back.config, params, ids[None])[0], ours, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (dataclasses.replace(SMALL, positions="sinusoidal"), ["sinusoidal positions"]),
        (dataclasses.replace(SMALL, positions="none"), ["none positions", "LayerNorm"]),
        (dataclasses.replace(SMALL, norm_place="post"), ["norms after the sums"]),
        (dataclasses.replace(SMALL, n_kv_heads=1), ["shared key/value heads"]),
        (dataclasses.replace(SMALL, d_head=6), ["heads of width 6"]),
        (dataclasses.replace(SMALL, qk_norm=True), ["QK-norm"]),
        (dataclasses.replace(SMALL, logit_softcap=5.0), ["a cap on the logits"]),
        (dataclasses.replace(MODERN, norm_bias=True), ["RMSNorm with biases"]),
        (dataclasses.replace(MODERN, mlp="relu2"), ["relu2 without a gate"]),
        (dataclasses.replace(MODERN, qk_norm=True, mlp_bias=True), ["biases of the MLP"]),
    ],
)
def test_what_has_no_form_is_refused_with_the_reasons(config, reasons):
    with pytest.raises(UserError) as caught:
        describe.describe(config)
    assert all(reason in str(caught.value) for reason in reasons)


def test_a_refusal_leaves_nothing_behind(tmp_path):
    save(tmp_path / "run", dataclasses.replace(SMALL, qk_norm=True))
    done = convert("export", tmp_path / "run", tmp_path / "out")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    for argv in (["absent", tmp_path / "x"], [tmp_path / "run", tmp_path / "run"]):
        assert convert("export", *argv).code == 2


def test_the_average_goes_out_unless_the_last_weights_are_asked_for(tmp_path):
    train = TrainConfig(model=SMALL, ema_decay=0.9)
    trees = {"params": weights_of(SMALL, 1), "average": weights_of(SMALL, 2)}
    save(tmp_path / "run", SMALL, trees, train)
    for flags, tree in (((), "average"), (("--weights", "raw"), "params")):
        out = tmp_path / tree
        assert convert("export", tmp_path / "run", out, *flags).code == 0
        table = load_file(out / "model.safetensors")["transformer.wte.weight"]
        assert np.array_equal(table, np.asarray(trees[tree]["tokens"])[:257])


def test_an_average_that_is_not_there_and_a_step_that_is_not(tmp_path):
    save(tmp_path / "run", SMALL)
    for flags, told in ((("--weights", "ema"), "no average"), (("--step", "7"), "step 7")):
        done = convert("export", tmp_path / "run", tmp_path / "out", *flags)
        assert done.code == 2 and told in done.err


def test_the_files_have_the_rights_of_others(tmp_path):
    """Not those of a temporary folder, which nobody else may read."""
    save(tmp_path / "run", SMALL)
    (tmp_path / "usual").mkdir()
    assert convert("export", tmp_path / "run", tmp_path / "deep/out").code == 0
    assert (tmp_path / "deep/out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    names = {path.name for path in (tmp_path / "deep/out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
