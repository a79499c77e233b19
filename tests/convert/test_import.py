"""Folders of other people's weights: the same logits as an independent form, or a refusal."""

import errno

import jax
import ml_dtypes
import numpy as np
import pytest
import standins
from programs import call, snapshot
from safetensors.numpy import load_file
from samples import objects

import gpt
from gpt import checkpoint
from gpt.convert import fields, incoming, outgoing
from gpt.errors import UserError
from gpt.model import transformer
from gpt.sampling import engine

IDS = np.random.default_rng(0).integers(300, size=64)


def convert(*argv):
    return call("gpt/convert/__main__", *argv)


def read(folder):
    source, _ = incoming.open_source(folder)
    return source.config, incoming.read_params(source)


def close(ours, exact):
    assert exact.std() > 0.3, "logits so flat that they would agree by themselves"
    return np.abs(ours - exact).max() < 1e-5 * max(1, np.abs(exact).max())


@pytest.mark.parametrize("kind", standins.KINDS)
def test_logits_equal_an_independent_form(kind, tmp_path):
    c = standins.KINDS[kind]
    weights = standins.tensors(c)
    config, params = read(standins.write(tmp_path, c, weights))
    ours = np.asarray(transformer.forward(config, params, IDS[None]))[0]
    assert close(ours, standins.logits(c, weights, IDS))


@pytest.mark.parametrize("kind", standins.KINDS)
def test_greedy_text_through_the_cache_is_that_of_an_independent_form(kind, tmp_path):
    """200 tokens, each the likeliest after those before it."""
    c, T = standins.with_context(standins.KINDS[kind], len(IDS) + 200), len(IDS) + 200
    weights = standins.tensors(c)
    config, params = read(standins.write(tmp_path, c, weights))
    params, ids_BT = transformer.unstack(params), np.zeros((1, T), np.int32)
    ids_BT[0, : len(IDS)] = IDS
    cache, logits_BV = engine.prefill(config, params, ids_BT, np.array([len(IDS)], np.int32))
    for place in range(len(IDS), T):
        ids_BT[0, place] = logits_BV[0].argmax()
        token_B, active_B = ids_BT[:, place], np.array([True])
        cache, logits_BV = engine.decode_step(config, params, cache, token_B, active_B)
    exact = standins.logits(c, weights, ids_BT[0])[len(IDS) - 1 : -1]
    assert exact.argmax(-1).tolist() == ids_BT[0, len(IDS) :].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama, biases"])
def test_shards_and_names_without_prefix(kind, tmp_path):
    c = standins.KINDS[kind]
    weights = standins.tensors(c)
    whole = read(standins.write(tmp_path / "a", c, weights))
    bare = {n.removeprefix("transformer.").removeprefix("model."): w for n, w in weights.items()}
    if kind == "gpt2":
        bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.uint8)
        bare["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    else:
        bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float64)
    parts = read(standins.write(tmp_path / "b", c, bare, parts=3))
    assert whole[0] == parts[0]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole[1], parts[1])))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(dtype, tmp_path):
    c = standins.LLAMA
    weights = standins.tensors(c, dtype=dtype)
    config, params = read(standins.write(tmp_path, c, weights))
    assert config.param_dtype == ("float32" if dtype is np.float16 else "bfloat16")
    ours = np.asarray(transformer.forward(config, params, IDS[None]))[0]
    assert close(ours, standins.logits(c, weights, IDS))


def test_a_tied_head_may_be_stored_beside_the_table(tmp_path):
    c, weights = standins.GPT2, standins.tensors(standins.GPT2)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].copy()
    config, params = read(standins.write(tmp_path / "a", c, weights))
    assert config.tied and "head" not in params
    weights["lm_head.weight"][5, 5] += 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        read(standins.write(tmp_path / "b", c, weights))


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("gpt2", {"model_type": "bert"}, "model_type is 'bert'"),
        ("gpt2", {"model_type": None}, "model_type"),
        ("gpt2", {"n_layer": None}, "lacks n_layer"),
        ("gpt2", {"n_layer": 2.0}, "n_layer is 2.0"),
        ("gpt2", {"n_layer": True}, "n_layer is True"),
        ("gpt2", {"n_layer": 10**9}, "layers"),
        ("gpt2", {"n_layer": 0}, "n_layers is 0"),
        ("gpt2", {"n_head": 0}, "n_heads is 0"),
        ("gpt2", {"n_embd": 3 * 2**29}, "weights"),
        ("gpt2", {"n_positions": 10**400}, "n_positions is 1000"),
        ("gpt2", {"initializer_range": 10**400}, "initializer_range is 1000"),
        ("llama", {"vocab_size": 2**60}, "vocab_size is 1152"),
        ("llama", {"vocab_size": 300.0}, "vocab_size is 300.0"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_heads 3"),
        ("llama", {"rope_theta": 10**400}, "rope_theta is 1000"),
        ("llama", {"a\nerror: b": 1}, r"'a\nerror: b' is 1"),
        ("llama", {"rope_scaling": {"rope_type": "default", "a\nb": 1}}, r"'a\nb' is 1"),
        ("gpt2", {"n_embd": 25}, "not divisible"),
        ("gpt2", {"activation_function": "gelu_fast"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt2", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
        ("gpt2", {"layer_norm_epsilon": -1.0}, "norm_epsilon"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": {"rope_type": "default", "mscale": 2.0}}, "mscale"),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}}, "several rope_theta"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"sliding_window": 16}, "sliding_window is 16"),
        ("llama", {"new_trick": 0.5}, "'new_trick' is 0.5"),
        ("mistral", {"sliding_window": 32}, "sliding_window is 32"),
        ("mistral", {"num_key_value_heads": None}, "num_key_value_heads"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_known_is_refused_by_name(kind, fields, named, tmp_path):
    c = {k: v for k, v in (standins.KINDS[kind] | fields).items() if v is not None}
    folder = standins.write(tmp_path / "in", c, standins.tensors(standins.KINDS[kind]))
    done = convert("import", folder, tmp_path / "out")
    assert (done.code, done.out) == (2, "") and done.err.startswith("error: ")
    assert named in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_fields_that_change_nothing_are_passed_over(kind):
    c = standins.KINDS[kind]
    more = {"attention_bias": False, "unsloth_fixed": True, "unsloth_version": "2026.1"}
    assert fields.read_config(c | more) == fields.read_config(c)


def test_tensors_that_are_missing_left_over_or_of_another_shape_are_listed(tmp_path):
    weights = standins.tensors(standins.GPT2)
    weights["transformer.h.2.ln_1.weight"] = weights.pop("transformer.h.0.ln_1.weight")
    weights["transformer.ln_f.bias"] = np.zeros(7, np.float32)
    done = convert(
        "import", standins.write(tmp_path / "in", standins.GPT2, weights), tmp_path / "o"
    )
    assert done.code == 2
    for told in (
        "missing: h.0.ln_1.weight",
        "not expected: h.2.ln_1.weight",
        "of another shape: ln_f.bias is [7], expected [24]",
    ):
        assert told in done.err


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    weights = standins.tensors(standins.LLAMA)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    done = convert(
        "import", standins.write(tmp_path / "in", standins.LLAMA, weights), tmp_path / "o"
    )
    assert done.code == 2 and "layers.1.mlp.up_proj.weight holds NaN" in done.err
    assert not (tmp_path / "o").exists()


def test_integers_are_no_weights(tmp_path):
    weights = standins.tensors(standins.LLAMA)
    weights["model.norm.weight"] = np.ones(24, np.int32)
    with pytest.raises(UserError, match=r"norm\.weight \(I32\)"):
        read(standins.write(tmp_path, standins.LLAMA, weights))


def test_a_name_with_and_without_the_prefix_is_refused(tmp_path):
    weights = standins.tensors(standins.LLAMA)
    weights["norm.weight"] = weights["model.norm.weight"]
    with pytest.raises(UserError, match="there twice"):
        read(standins.write(tmp_path, standins.LLAMA, weights))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run's folder of a Llama without a tokenizer, its config and its tensors."""
    folder = tmp_path_factory.mktemp("llama")
    c = standins.KINDS["llama 3"]
    weights = standins.tensors(c)
    done = convert("import", standins.write(folder / "in", c, weights), folder / "run")
    assert (done.code, done.out) == (0, "") and "prompts are ids" in done.err
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
    assert convert("import", standins.write(tmp_path / "in", c), tmp_path / "run").code == 0
    lm = gpt.load(tmp_path / "run")
    assert len(lm.generate([[1, 2]], max_new_tokens=70, on_context_full="slide")[0].token_ids) == 70
    for argv in (["--max-new-tokens", "3"], ["--score-ids", "1 2"]):
        done = call("sample", tmp_path / "run", *argv)
        assert done.code == 2 and done.err.startswith("error: ")


def test_what_is_there_is_not_touched(imported):
    run, *_ = imported
    before = snapshot(run)
    done = convert("import", run.parent / "in", run)
    assert done.code == 2 and "is there already" in done.err
    assert snapshot(run) == before


@pytest.mark.parametrize("program", ["import", "export"])
def test_a_full_disk_leaves_nothing_behind(program, imported, tmp_path, monkeypatch):
    run, *_ = imported
    source = {"import": run.parent / "in", "export": run}[program]

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.Writer, "save", fail)
    monkeypatch.setattr(outgoing, "write_file", fail)
    done = convert(program, source, tmp_path / "out")
    assert done.code == 2
    assert done.err.endswith(
        f"error: {tmp_path / 'out'} cannot be written: No space left on device\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_an_error(imported, tmp_path):
    run, *_ = imported
    (tmp_path / "file").write_text("kept")
    for program, source in (("import", run.parent / "in"), ("export", run)):
        for dest in (tmp_path / "file", tmp_path / "file/out"):
            done = convert(program, source, dest)
            assert done.code == 2 and "error: " in done.err.splitlines()[-1]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.slow  # test_weights_doc.py tunes by the commands of the document
def test_fine_tuning_begins_with_the_imported_weights(tmp_path, text):
    """Step 0 of a run from an imported GPT-2 with a byte tokenizer: its loss, not a fresh one's."""
    c = standins.GPT2 | {"vocab_size": 257, "eos_token_id": 256}
    folder = standins.write(tmp_path / "in", c, standins.tensors(c, dtype=np.float32))
    weights = load_file(folder / "model.safetensors")
    standins.write_tokenizer(folder, standins.tokenizer_json([], {"<|endoftext|>": 256}))
    assert convert("import", folder, tmp_path / "run").code == 0
    shape = "--seq-len 64 --batch-size 4 --steps 1 --warmup-steps 0 --learning-rate 1e-9 "
    shape += "--min-learning-rate 0 --grad-accum 1"
    argv = ["gpt2", "--init-from", tmp_path / "run", "--data", text, "--out", tmp_path / "tuned"]
    done = call("train", *argv, *shape.split())
    assert done.code == 0, done.err
    lm = gpt.load(tmp_path / "tuned")
    ids = lm.tokenizer.encode_ordinary("the cat sat on the hill")
    ours = np.asarray(transformer.forward(lm.config, lm.params, np.array([ids])))[0]
    assert close(ours, standins.logits(c, weights, ids))
