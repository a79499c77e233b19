"""Models of others coming in: the same logits as an independent form, or a refusal by name."""

import errno
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import standins
from programs import call, snapshot
from safetensors.numpy import load_file, save_file
from samples import objects

import gpt
from gpt import checkpoint
from gpt.convert import convert, hf_weights
from gpt.convert.hf_config import to_hf_config
from gpt.errors import UserError
from gpt.model import transformer

IDS = np.random.default_rng(0).integers(300, size=64)
# Each family once; among them every type of weights, whole files and shards.
FAMILIES = {
    "gpt2": (np.float32, 2),
    "gpt2, untied, exact gelu": (np.float16, 1),
    "llama": (ml_dtypes.bfloat16, 1),
    "llama 3": (np.float32, 1),
    "llama, biases": (np.float16, 3),
    "mistral": (np.float32, 1),
    "qwen2": (ml_dtypes.bfloat16, 2),
    "qwen3": (np.float32, 3),
}


def command(*argv):
    return call("gpt/convert/__main__", *argv)


def bits(folder):
    """Every tensor of a folder by name: its type, shape and bits."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= {n: (str(a.dtype), a.shape, a.tobytes()) for n, a in load_file(path).items()}
    return found


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_family_comes_in_and_goes_out(kind, tmp_path):
    """Logits of an independent form; and through a run's folder the same bits again."""
    c, (dtype, parts) = standins.KINDS[kind], FAMILIES[kind]
    weights = standins.tensors(c, dtype=dtype)
    folder = standins.write(tmp_path / "in", c, weights, parts)
    model = convert.open_model(folder)
    assert model.config.param_dtype == ("bfloat16" if dtype is ml_dtypes.bfloat16 else "float32")
    exact = standins.logits(c, weights, IDS)
    assert exact.std() > 0.3, "logits so flat that they would agree by themselves"
    ours = transformer.forward(model.config, model.read_params(), IDS[None])[0]
    assert np.abs(ours - exact).max() < 1e-5 * max(1, np.abs(exact).max())

    convert.import_model(folder, tmp_path / "run", False, log=lambda text: None)
    convert.export_model(tmp_path / "run", tmp_path / "out", None, None, log=pytest.fail)
    assert bits(tmp_path / "out") == bits(folder)
    back = convert.open_model(tmp_path / "out")
    assert to_hf_config(back.config) == to_hf_config(model.config) and back.unused_fields == []
    theirs = json.loads((folder / "config.json").read_text())
    ours = json.loads((tmp_path / "out/config.json").read_text())
    assert ours["eos_token_id"] == theirs["eos_token_id"]
    if kind != "mistral":  # which goes out as the Llama that it is without its window
        assert ours["model_type"] == theirs["model_type"]
    if kind.startswith("gpt2"):
        assert ours["architectures"] == ["GPT2LMHeadModel"] and ours["n_ctx"] == theirs["n_ctx"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_body_alone_and_old_buffers(kind, tmp_path):
    """Names without the prefix, and tensors in old files that are not weights."""
    c = standins.KINDS[kind]
    weights = standins.tensors(c)
    bare = {n.removeprefix("transformer.").removeprefix("model."): w for n, w in weights.items()}
    if kind == "gpt2":
        bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.uint8)
        bare["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    else:
        bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float64)
    whole = convert.open_model(standins.write(tmp_path / "whole", c, weights)).read_params()
    body = convert.open_model(standins.write(tmp_path / "body", c, bare)).read_params()
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, body)))


def test_a_tied_head_may_be_stored_beside_the_table(tmp_path):
    weights = standins.tensors(standins.GPT2)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].copy()
    model = convert.open_model(standins.write(tmp_path / "same", standins.GPT2, weights))
    assert model.config.tied and "head" not in model.read_params()
    weights["lm_head.weight"][5, 5] += 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        convert.open_model(standins.write(tmp_path / "other", standins.GPT2, weights))


def test_tensors_that_do_not_fit_are_listed_together(tmp_path):
    weights = standins.tensors(standins.GPT2)
    weights["transformer.h.2.ln_1.weight"] = weights.pop("transformer.h.0.ln_1.weight")
    weights["transformer.ln_f.bias"] = np.zeros(7, np.float32)
    weights["transformer.ln_f.weight"] = np.ones(24, np.int32)
    folder = standins.write(tmp_path / "in", standins.GPT2, weights)
    with pytest.raises(UserError) as caught:
        convert.open_model(folder)
    for problem in (
        "missing: h.0.ln_1.weight",
        "not expected: h.2.ln_1.weight",
        "of another shape: ln_f.bias is [7], expected [24]",
        "of a type other than F32, F16, BF16: ln_f.weight (I32)",
    ):
        assert problem in str(caught.value)
    weights["wpe.weight"] = weights["transformer.wpe.weight"]
    with pytest.raises(UserError, match="both with and without"):
        convert.open_model(standins.write(tmp_path / "in", standins.GPT2, weights))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    weights = standins.tensors(standins.LLAMA)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    folder = standins.write(tmp_path / "in", standins.LLAMA, weights)
    done = command("import", folder, tmp_path / "out")
    assert done.code == 2 and "layers.1.mlp.up_proj.weight holds NaN or infinity" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("index", "reason"),
    {
        "elsewhere": ({"t": "../a.safetensors"}, "expected a .safetensors file here"),
        "absolute": ({"t": "/a.safetensors"}, "expected a .safetensors file here"),
        "a pickle": ({"t": "a.bin"}, "expected a .safetensors file here"),
        "a number": ({"t": 1}, "expected a .safetensors file here"),
        "one not there": ({"t": "a.safetensors", "x": "a.safetensors"}, "in no file: x"),
        "exchanged": ({"t": "b.safetensors"}, "in no file: t"),
        "no such file": ({"t": "c.safetensors"}, "not a file"),
        "empty": ({}, "no weight_map"),
        "a list": ([1], "no weight_map"),
    }.values(),
)
def test_an_index_that_does_not_fit_is_refused(index, reason, tmp_path):
    save_file({"t": np.ones(2)}, tmp_path / "a.safetensors")
    save_file({"u": np.ones(2)}, tmp_path / "b.safetensors")
    (tmp_path / hf_weights.INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=reason):
        hf_weights.open_folder(tmp_path)


def test_what_is_not_a_models_folder_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for source, reason in (
        (tmp_path, r"neither.*A pickle.*save_pretrained"),
        (tmp_path / "pytorch_model.bin", r"is a file.*A pickle.*save_pretrained"),
        (tmp_path / "absent", "no folder"),
    ):
        with pytest.raises(UserError, match=reason):
            convert.open_model(source)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run's folder of a Llama without a tokenizer, its config and its tensors."""
    folder = tmp_path_factory.mktemp("llama")
    c = standins.KINDS["llama 3"] | {"new_field": 0.5}
    weights = standins.tensors(c)
    done = command("import", standins.write(folder / "in", c, weights), folder / "run")
    assert (done.code, done.out) == (0, "")
    assert "prompts are ids" in done.err and "not used: 'new_field'" in done.err
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
    done = call("sample", run, "--prompt", "text")
    assert done.code == 2 and "without a tokenizer" in done.err
    assert call("sample", run, "--max-new-tokens", "3").code == 0  # from the end of a text


def test_a_model_without_an_end_of_text(tmp_path):
    c = {k: v for k, v in standins.LLAMA.items() if k != "eos_token_id"}
    assert command("import", standins.write(tmp_path / "in", c), tmp_path / "run").code == 0
    lm = gpt.load(tmp_path / "run")
    assert len(lm.generate([[1, 2]], max_new_tokens=70, on_context_full="slide")[0].token_ids) == 70
    for argv in (["--max-new-tokens", "3"], ["--score-ids", "1 2"]):
        done = call("sample", tmp_path / "run", *argv)
        assert done.code == 2 and done.err.startswith("error: ")


def test_what_is_there_is_not_touched(imported, tmp_path):
    run, *_ = imported
    (tmp_path / "file").write_text("kept")
    before = snapshot(run), snapshot(tmp_path)
    for program, source in (("import", run.parent / "in"), ("export", run)):
        for dest in (run, tmp_path / "file", tmp_path / "file/out"):
            done = command(program, source, dest)
            assert done.code == 2 and "error: " in done.err.splitlines()[-1]
    assert before == (snapshot(run), snapshot(tmp_path))


@pytest.mark.parametrize("program", ["import", "export"])
def test_a_full_disk_leaves_nothing_behind(program, imported, tmp_path, monkeypatch):
    run, *_ = imported
    source = {"import": run.parent / "in", "export": run}[program]

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.CheckpointManager, "save", fail)
    monkeypatch.setattr(hf_weights, "write_safetensors", fail)
    done = command(program, source, tmp_path / "out")
    assert done.code == 2
    assert done.err.endswith(
        f"error: {tmp_path / 'out'} cannot be written: No space left on device\n"
    )
    assert not list(tmp_path.iterdir())
