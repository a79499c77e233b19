"""config.json: what is read, what is refused by name, what is ignored; and back again."""

import dataclasses
import re

import pytest
import standins
import tyro
from programs import ROOT
from standins import MODERN, SMALL

from gpt.config import TrainConfig
from gpt.convert.hf_config import FAMILIES, read_config, to_hf_config
from gpt.errors import UserError


@pytest.mark.parametrize("name", standins.HUB)
def test_a_config_of_the_hub_is_read_without_remarks(name):
    c = standins.HUB[name]
    config, family, unused = read_config(c)
    assert unused == []
    again = read_config(to_hf_config(config)[0])
    assert read_config(standins.HUB.get(f"{name}, saved again", c)) == (config, family, unused)
    # The classes of a form with a choice, such as Llama's biases, are told apart when written.
    assert dataclasses.replace(again[0], d_head=config.d_head, d_ff=config.d_ff) == config
    assert again[1:] == (family, [])


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("gpt2", {"model_type": "bert"}, "model_type is 'bert'"),
        ("gpt2", {"n_layer": None}, "n_layer is missing"),
        ("gpt2", {"n_layer": 2.0}, "n_layer is 2.0, expected int"),
        ("gpt2", {"n_embd": 25}, "not divisible"),
        ("gpt2", {"activation_function": "gelu_fast"}, "activation_function is 'gelu_fast'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt2", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_heads 3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "low_freq_factor is missing"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"sliding_window": 16}, "sliding_window is 16"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("mistral", {"sliding_window": 32}, "sliding_window is 32"),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 8192}, "is 4096"),
        ("mistral", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_what_changes_the_function_is_refused_by_name(kind, fields, named):
    values = standins.KINDS[kind] | fields
    values = {name: value for name, value in values.items() if fields.get(name, 0) is not None}
    with pytest.raises(UserError) as caught:
        read_config(values)
    assert named in str(caught.value)


# Some of what transformers 4 wrote beside a model's own fields when all defaults were asked for.
OLD_DEFAULTS = {"add_cross_attention": False, "id2label": {"0": "LABEL_0"}, "max_length": 20}
OLD_DEFAULTS |= {"num_beams": 1, "pruned_heads": {}, "task_specific_params": None}
# What means nothing where it is empty or zero, and what nobody knows.
OTHERS = {"num_experts": 0, "moe_layers": [], "new": None, "unsloth_version": "2026.1"}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_defaults_that_are_spelled_out_change_nothing_and_what_is_not_known_is_named(kind):
    plain = read_config(standins.KINDS[kind])
    config, family, unused = read_config(OLD_DEFAULTS | OTHERS | standins.KINDS[kind])
    assert (config, family) == plain[:2]
    assert unused == ["max_length", "num_beams", "unsloth_version"]


def test_all_problems_are_in_one_message():
    values = standins.LLAMA | {"hidden_act": "relu", "vocab_size": "300", "num_experts": 4}
    with pytest.raises(UserError) as caught:
        read_config({name: v for name, v in values.items() if name != "hidden_size"})
    for problem in ("hidden_act", "vocab_size", "num_experts", "hidden_size"):
        assert problem in str(caught.value)


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("llama", False), ("qwen2", False)])
def test_a_head_is_tied_where_transformers_ties_it_by_default(kind, tied):
    values = {n: v for n, v in standins.KINDS[kind].items() if n != "tie_word_embeddings"}
    assert read_config(values)[0].tied == tied


NEEDED = [
    (SMALL, {"positions": "sinusoidal"}, "GPT-2's needs --model.positions learned, and"),
    (SMALL, {"positions": "none"}, "--model.norm rms"),
    (SMALL, {"norm_place": "post"}, "GPT-2's needs --model.norm-place pre, and"),
    (SMALL, {"n_kv_heads": 1}, "GPT-2's needs --model.n-kv-heads 2, and"),
    (SMALL, {"d_head": 6}, "GPT-2's needs --model.d-head None, and"),
    (SMALL, {"qk_norm": True}, "GPT-2's needs --model.no-qk-norm, and"),
    (SMALL, {"logit_softcap": 5.0}, "GPT-2's needs --model.logit-softcap 0, and"),
    (MODERN, {"norm_bias": True}, "Llama's needs --model.norm-bias False;"),
    (MODERN, {"mlp": "relu2"}, "Llama's needs --model.mlp swiglu;"),
    (MODERN, {"qk_norm": True, "mlp_bias": True}, "Llama's needs --model.mlp-bias False;"),
    (MODERN, {"bias": True, "qk_norm": True}, "Llama's needs --model.no-bias;"),
]


@pytest.mark.parametrize(("config", "changes", "needed"), NEEDED)
def test_a_model_without_a_form_is_refused_with_the_flags_that_help(config, changes, needed):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(UserError) as caught:
        to_hf_config(config)
    message = str(caught.value)
    assert needed in message
    gpt2, llama = message.split("GPT-2's needs ")[1].split(", and Llama's needs ")
    for flags, form in ((gpt2, "gpt2"), (llama.split(";")[0], "llama qwen2 qwen3")):
        model = tyro.cli(TrainConfig, args=flags.split(), default=TrainConfig(model=config)).model
        assert to_hf_config(model)[0]["model_type"] in form.split()


def test_every_family_that_the_guide_names_is_one():
    guide = (ROOT / "docs/weights.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?) \|", guide, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(FAMILIES)
