"""Models of others coming in and ours going out: the same function, or a refusal by name."""

import dataclasses
import errno
import json

import jax
import ml_dtypes
import numpy as np
import numpy_transformer
import pytest
import standins
from programs import objects, program, refuse, snapshot, succeed
from safetensors.numpy import load_file, save_file
from standins import MODERN, SMALL

from gpt import checkpoint
from gpt.config import TrainConfig, to_json
from gpt.convert import convert, hf_weights
from gpt.convert.hf_config import read_config, to_hf_config
from gpt.data import tokenizers
from gpt.errors import UserError
from gpt.model import transformer

IDS = np.random.default_rng(0).integers(257, size=24)
# Each family once; among them every type of weights, whole files and shards.
FAMILIES = {
    "gpt2": (np.float32, 2),
    "gpt2, untied, exact gelu, narrow mlp": (np.float16, 1),
    "gpt2, relu": (np.float32, 1),
    "llama": (ml_dtypes.bfloat16, 1),
    "llama 3": (np.float32, 1),
    "llama, biases": (np.float16, 3),
    "mistral": (np.float32, 1),
    "qwen2": (ml_dtypes.bfloat16, 2),
    "qwen3": (np.float32, 3),
}


CONVERT = "gpt/convert/__main__"


def bits(tensors):
    """Tensors by name: type, shape and bits."""
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in tensors.items()}


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_family_comes_in_and_goes_out(kind, tmp_path):
    """Logits of an independent form, by an independent forward pass; then the same tensors."""
    c, (dtype, parts) = standins.KINDS[kind], FAMILIES[kind]
    weights = standins.tensors(c, dtype=dtype)
    model = convert.open_model(standins.write(tmp_path, c, weights, parts))
    assert model.config.param_dtype == ("bfloat16" if dtype is ml_dtypes.bfloat16 else "float32")
    params = jax.device_get(model.read_params())
    exact = standins.logits(c, weights, IDS)
    assert exact.std() > 0.3, "logits so flat that they would agree by themselves"
    ours = numpy_transformer.forward(in_float64(params), IDS, model.config)
    assert np.abs(ours - exact).max() < 1e-5 * max(1, np.abs(exact).max())

    values, family = to_hf_config(model.config)
    shapes = hf_weights.tensor_shapes(model.config, family)
    tensors = hf_weights.to_tensors(model.config, family, params, np.dtype(dtype))
    assert bits(dict(zip(shapes, tensors, strict=True))) == bits(weights)
    # A Mistral goes out as the Llama that it is without its window.
    assert values["model_type"] == c["model_type"].replace("mistral", "llama")


def in_float64(params):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), params)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_import_then_export_is_the_identity(kind, tmp_path):
    """Through a run's folder."""
    c, (dtype, parts) = standins.KINDS[kind], FAMILIES[kind]
    weights = standins.tensors(c, dtype=dtype)
    folder = standins.write(tmp_path / "in", c, weights, parts)
    convert.import_model(folder, tmp_path / "run", False, log=lambda text: None)
    convert.export_model(tmp_path / "run", tmp_path / "out", None, None, log=pytest.fail)
    assert bits(load_file(tmp_path / "out/model.safetensors")) == bits(weights)
    about = json.loads((tmp_path / "out/config.json").read_text())
    assert about["eos_token_id"] == c["eos_token_id"] and about["bos_token_id"] is None
    assert about["dtype"] == np.dtype(dtype).name
    assert about["architectures"] == c["architectures"] and about.get("n_ctx") == c.get("n_ctx")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_body_alone_and_old_buffers(kind, tmp_path):
    """Names without the prefix, and tensors in old files that are not weights."""
    c = standins.KINDS[kind]
    weights = standins.tensors(c)
    bare = {n.removeprefix("transformer.").removeprefix("model."): w for n, w in weights.items()}
    if kind == "gpt2":
        bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.uint8)
        bare["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
        bare["lm_head.weight"] = bare["wte.weight"] + 1  # beside a tied table it is not used
    else:
        bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float64)
    whole = convert.open_model(standins.write(tmp_path / "whole", c, weights)).read_params()
    body = convert.open_model(standins.write(tmp_path / "body", c, bare)).read_params()
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, body)))


def test_tensors_that_do_not_fit_are_listed_together(tmp_path):
    weights = standins.tensors(standins.GPT2)
    weights["transformer.h.2.ln_1.weight"] = weights.pop("transformer.h.0.ln_1.weight")
    weights["transformer.ln_f.bias"] = np.zeros(7, np.float32)
    weights["transformer.ln_f.weight"] = np.ones(24, np.int32)
    with pytest.raises(UserError) as caught:
        convert.open_model(standins.write(tmp_path, standins.GPT2, weights))
    for problem in (
        "missing: transformer.h.0.ln_1.weight",
        "not expected: transformer.h.2.ln_1.weight",
        "of another shape, or of a type other than F32, F16, BF16: transformer.ln_f.bias is F32 "
        "[7], expected [24], transformer.ln_f.weight is I32 [24], expected [24]",
    ):
        assert problem in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = standins.tensors(standins.LLAMA)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = -np.inf
    folder = standins.write(tmp_path / "in", standins.LLAMA, weights)
    words = "layers.1.mlp.up_proj.weight holds NaN or infinity"
    refuse(words, CONVERT, "import", folder, tmp_path / "o")
    assert not (tmp_path / "o").exists()


DAMAGES = {
    "cut weights": ("model.safetensors", lambda data: data[: len(data) // 2]),
    "a header beyond the file": ("model.safetensors", lambda data: b"\xff" * 4 + data[4:]),
    "a cut config": ("config.json", lambda data: data[:-9]),
    "a config that is no object": ("config.json", lambda data: b"[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(damage, tmp_path):
    standins.write(tmp_path, standins.GPT2)
    name, change = DAMAGES[damage]
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(UserError) as caught:
        convert.open_model(tmp_path).read_params()
    assert 0 < len(str(caught.value)) < 2000 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "reason"),
    [({"t": "c.safetensors"}, "not a file"), ([1], "no weight_map")],
)
def test_an_index_that_does_not_fit_is_refused(index, reason, tmp_path):
    save_file({"t": np.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / hf_weights.INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=reason):
        hf_weights.open_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "advice"),
    {
        "pytorch_model.bin": r"a pickle.*save it with save_pretrained\(NEW_FOLDER\)",
        "ckpt.pt": r"docs/weights.md says what to do with nanoGPT's ckpt.pt, and nanochat's models",
        "model_000500.pt": "nanochat's models cannot be imported$",
        "consolidated.00.pth": "Opening a pickle can run arbitrary code",
        "last.ckpt": "Opening a pickle can run arbitrary code",
        "readme.txt": "holds no model.safetensors.*shards with their index$",
    }.items(),
)
def test_what_is_not_a_models_folder_is_refused_with_advice(file, advice, tmp_path):
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for source in (tmp_path, tmp_path / file):
        with pytest.raises(UserError, match=advice):
            convert.open_model(source)
    with pytest.raises(UserError, match="gone does not exist: expected a model's folder"):
        convert.open_model(tmp_path / "gone")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run's folder of a Llama without a tokenizer, its config and its tensors."""
    folder = tmp_path_factory.mktemp("llama")
    c = standins.KINDS["llama 3"] | {"new_field": 0.5}
    weights = standins.tensors(c)
    done = succeed(CONVERT, "import", standins.write(folder / "in", c, weights), folder / "run")
    assert done.out == ""
    assert "prompts are ids" in done.err and "not used: new_field" in done.err
    return folder / "run", c, weights


def test_ids_are_sampled_and_scored_without_a_tokenizer(imported):
    """Greedy tokens and log-probabilities are those of the independent form."""
    run, c, weights = imported
    ids = [5, 17, 250]
    (drawn,) = objects(
        run, "--prompt-ids", "5 17 250", "--temperature", "0", "--max-new-tokens", "9"
    )
    for token in drawn["token_ids"]:
        assert token == standins.logits(c, weights, ids)[-1].argmax()
        ids.append(token)
    assert drawn["text"] == "".join(f"<{i}>" for i in drawn["token_ids"])
    (scored,) = objects(run, "--score-ids", "5 17 250")
    exact = standins.logits(c, weights, [299, 5, 17])
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    assert np.allclose(scored["logprobs"], exact[range(3), [5, 17, 250]], atol=1e-4)
    refuse("without a tokenizer", "sample", run, "--prompt", "text")
    succeed("sample", run, "--max-new-tokens", "9")  # from the end of a text


def test_a_model_without_an_end_of_text(tmp_path):
    c = {k: v for k, v in standins.LLAMA.items() if k != "eos_token_id"}
    succeed(CONVERT, "import", standins.write(tmp_path / "in", c), tmp_path / "run")
    for argv in (["--max-new-tokens", "3"], ["--score-ids", "1"]):
        refuse("", "sample", tmp_path / "run", *argv)


def test_what_is_there_is_not_touched(imported, tmp_path):
    run, *_ = imported
    (tmp_path / "file").write_text("kept")
    before = snapshot(run), snapshot(tmp_path)
    for way, source in (("import", run.parent / "in"), ("export", run)):
        for dest in (run, tmp_path / "file", tmp_path / "file/out"):
            refuse(str(dest.parent), CONVERT, way, source, dest)
    assert before == (snapshot(run), snapshot(tmp_path))


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_full_disk_leaves_nothing_behind(way, imported, tmp_path, monkeypatch):
    run, *_ = imported
    source = {"import": run.parent / "in", "export": run}[way]

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.CheckpointManager, "save", fail)
    monkeypatch.setattr(hf_weights, "write_safetensors", fail)
    words = f"{tmp_path / 'out'} cannot be written: No space left on device\n"
    refuse(words, CONVERT, way, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpt2_xl_fits_in_little_more_than_its_file():
    """3.1 GB in bfloat16, written, imported by a process of its own, and removed."""
    found = program("benchmarks/importing").measure("gpt2-xl", "bfloat16")
    assert found["file_bytes"] > 3.1e9
    assert found["ratio"] < 1.3


# Runs of ours going out: the function that was trained, under the names of transformers.

OURS = {
    "gpt2 without biases": dataclasses.replace(SMALL, bias=False, tied=False, mlp="relu2"),
    "gpt2 with some biases": dataclasses.replace(SMALL, bias=False, qkv_bias=True, norm_bias=True),
    "llama, output biases alone": dataclasses.replace(MODERN, out_bias=True, d_head=6),
    "llama, stretched": dataclasses.replace(
        MODERN, rope_factor=4.0, rope_context=16, n_kv_heads=1, tied=False
    ),
    "qwen2": dataclasses.replace(MODERN, qkv_bias=True, d_head=MODERN.head_width),
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


def test_the_average_goes_out_unless_the_last_weights_are_asked_for(tmp_path):
    """Into a new folder with the rights of any other, not those of a temporary one."""
    trees = {"params": random_weights(SMALL, 1), "ema_params": random_weights(SMALL, 2)}
    save(tmp_path / "run", SMALL, trees, TrainConfig(model=SMALL, ema_decay=0.9))
    (tmp_path / "usual").mkdir()
    for flags, tree in (((), "ema_params"), (("--weights", "raw"), "params")):
        out = tmp_path / "deep" / tree
        done = succeed(CONVERT, "export", tmp_path / "run", out, *flags)
        assert done.out == "" and "GPT2LMHeadModel in float32" in done.err
        table = load_file(out / "model.safetensors")["transformer.wte.weight"]
        assert np.array_equal(table, np.asarray(trees[tree]["tokens"])[:257])
        assert out.stat().st_mode == (tmp_path / "usual").stat().st_mode
        for name in ("config.json", "generation_config.json"):
            assert json.loads((out / name).read_text())["eos_token_id"] == 256
        assert (out / "tokenizer.json").exists() and (out / "tokenizer_config.json").exists()


def test_what_is_asked_for_in_vain(tmp_path):
    save(tmp_path / "run", SMALL)
    save(tmp_path / "formless", dataclasses.replace(SMALL, qk_norm=True))
    for argv, told in (
        (("run", "--weights", "ema"), "no average"),
        (("run", "--step", "7"), "step 7"),
        (("absent",), "no folder"),
        (("formless",), "error: transformers has no architecture for this model: GPT-2's needs"),
    ):
        refuse(told, CONVERT, "export", tmp_path / argv[0], tmp_path / "out", *argv[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["formless", "run"]
