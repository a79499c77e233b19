"""config.json: what is read, what is refused by name, what is ignored; and back again."""

import dataclasses

import hub_configs
import pytest
import standins
import tyro

from gpt.config import ModelConfig, TrainConfig
from gpt.convert.hf_config import read_config, to_hf_config
from gpt.errors import UserError

SMALL = ModelConfig(257, context_length=64, n_layers=2, n_heads=2, d_model=16, d_ff=20)
MODERN = dataclasses.replace(SMALL, positions="rope", norm="rms", mlp="swiglu", bias=False)


@pytest.mark.parametrize("name", hub_configs.CONFIGS)
def test_a_config_of_the_hub_is_read_without_remarks(name):
    c = hub_configs.CONFIGS[name]
    config, family, unused = read_config(c)
    assert unused == []
    again = read_config(to_hf_config(config)[0])
    # The classes of a form with a choice, such as Llama's biases, are told apart when written.
    assert dataclasses.replace(again[0], d_head=config.d_head, d_ff=config.d_ff) == config
    assert again[1:] == (family, [])


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-0.6B"])
def test_transformers_4_and_5_write_the_same_model(name):
    c = hub_configs.CONFIGS[name]
    assert read_config(hub_configs.saved_again(c)) == read_config(c)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("gpt2", {"model_type": "bert"}, "model_type is 'bert'"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type is ['gpt2']"),
        ("gpt2", {"n_layer": None}, "n_layer is missing"),
        ("gpt2", {"n_layer": 2.0}, "n_layer is 2.0, expected int"),
        ("gpt2", {"n_layer": True}, "n_layer is True"),
        ("gpt2", {"n_head": 0}, "n_heads is 0"),
        ("gpt2", {"n_positions": 10**400}, "n_positions is 1000"),
        ("gpt2", {"initializer_range": 10**400}, "initializer_range is 1000"),
        ("gpt2", {"initializer_range": float("nan")}, "initializer_range is nan"),
        ("gpt2", {"n_embd": 25}, "not divisible"),
        ("gpt2", {"activation_function": "gelu_fast"}, "activation_function is 'gelu_fast'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt2", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_heads 3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "low_freq_factor is missing"),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}}, "two values of rope_theta"),
        ("llama", {"rope_parameters": {"a": 1}, "rope_scaling": {"a": 2}}, "both there"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"partial_rotary_factor": True}, "partial_rotary_factor is True"),
        ("llama", {"sliding_window": 16}, "sliding_window is 16"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("llama", {"residual_multiplier": 0.2}, "residual_multiplier is 0.2"),
        ("mistral", {"sliding_window": 32}, "sliding_window is 32"),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 8192}, "is 4096"),
        ("mistral", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"attention_bias": True}, "attention_bias is True"),
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


def test_all_problems_are_in_one_message():
    values = standins.LLAMA | {"hidden_act": "relu", "vocab_size": "300", "num_experts": 4}
    with pytest.raises(UserError) as caught:
        read_config({name: v for name, v in values.items() if name != "hidden_size"})
    for problem in ("hidden_act", "vocab_size", "num_experts", "hidden_size"):
        assert problem in str(caught.value)


def test_what_is_not_known_is_named_and_ignored():
    c = standins.KINDS["qwen2"]
    more = {"unsloth_version": "2026.1", "num_experts": 0, "moe_layers": [], "new": None}
    config, family, unused = read_config(c | more)
    assert (config, family) == read_config(c)[:2]
    assert unused == ["unsloth_version"]


OBSTACLES = [
    (dataclasses.replace(SMALL, positions="sinusoidal"), ["sinusoidal positions"]),
    (dataclasses.replace(SMALL, positions="none"), ["none positions", "LayerNorm"]),
    (dataclasses.replace(SMALL, norm_place="post"), ["norms after the sums"]),
    (dataclasses.replace(SMALL, n_kv_heads=1), ["shared key/value heads"]),
    (dataclasses.replace(SMALL, d_head=6), ["heads of width 6"]),
    (dataclasses.replace(SMALL, qk_norm=True), ["QK-norm"]),
    (dataclasses.replace(SMALL, logit_softcap=5.0), ["a cap on the logits"]),
    (dataclasses.replace(MODERN, norm_bias=True), ["biases of the norms"]),
    (dataclasses.replace(MODERN, mlp="relu2"), ["relu2 without a gate"]),
    (dataclasses.replace(MODERN, qk_norm=True, mlp_bias=True), ["biases of the MLP"]),
    (dataclasses.replace(MODERN, bias=True, qk_norm=True), ["norms", "biases of the MLP"]),
]


@pytest.mark.parametrize(("config", "reasons"), OBSTACLES)
def test_a_model_without_a_form_is_refused_with_the_flags_that_help(config, reasons):
    with pytest.raises(UserError) as caught:
        to_hf_config(config)
    message = str(caught.value)
    assert all(reason in message for reason in reasons)
    flags = message.split("trained with ")[1].removesuffix(" can be exported").split()
    train = tyro.cli(TrainConfig, args=flags, default=TrainConfig(model=config))
    to_hf_config(train.model)
