"""Configs refuse what cannot work, in one sentence; presets are GPT-2; every field is read."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import flops
from gpt.config import MeshConfig, ModelConfig, TrainConfig, from_json, to_json
from gpt.errors import UserError
from gpt.presets import PRESETS, preset

ROOT = Path(__file__).parent.parent

REFUSED = [
    (ModelConfig, {"norm": "rmsnorm"}, "model.norm is 'rmsnorm': expected one of layer, rms"),
    (ModelConfig, {"n_layers": 0}, "model.n_layers is 0: expected at least 1"),
    (ModelConfig, {"d_model": 100, "n_heads": 3}, "model.d_model 100 is not divisible by"),
    (ModelConfig, {"n_heads": 4, "n_kv_heads": 3}, "model.n_heads 4 is not divisible by"),
    (ModelConfig, {"dropout": 1.0}, "model.dropout is 1.0: expected 0 <= dropout < 1"),
    (ModelConfig, {"dropout": float("nan")}, "model.dropout is nan"),
    (ModelConfig, {"positions": "rope", "d_head": 5}, "heads of width 5 cannot be rotated"),
    (ModelConfig, {"positions": "sinusoidal", "d_model": 33, "d_head": 4}, "model.d_model is 33"),
    (ModelConfig, {"logit_softcap": -1.0}, "model.logit_softcap is -1.0"),
    (ModelConfig, {"rope_theta": 0.0}, "model.rope_theta is 0.0"),
    (ModelConfig, {"rope_low": 4.0}, "model.rope_high - model.rope_low is 0.0: expected"),
    (ModelConfig, {"rope_factor": float("inf")}, "model.rope_factor is inf"),
    (ModelConfig, {"rope_context": 0}, "model.rope_context is 0"),
    (ModelConfig, {"norm_epsilon": float("nan")}, "model.norm_epsilon is nan"),
    (MeshConfig, {"tensor": -1}, "mesh (-1, 1, -1): expected positive sizes, at most one"),
    (TrainConfig, {"steps": 0}, "steps is 0: expected at least 1"),
    (TrainConfig, {"batch_size": 10, "grad_accum": 4}, "batch_size 10 is not divisible by"),
    (TrainConfig, {"learning_rate": 0.0}, "learning_rate is 0.0: expected a positive number"),
    (TrainConfig, {"min_learning_rate": 1.0}, "min_learning_rate is 1.0: expected between"),
    (TrainConfig, {"warmup_steps": -1}, "warmup_steps is -1: expected zero or more"),
    (TrainConfig, {"clip_norm": float("inf")}, "clip_norm is inf: expected zero or more"),
    (TrainConfig, {"beta1": 1.0}, "beta1 is 1.0: expected 0 <= beta1 < 1"),
    (TrainConfig, {"seed": -1}, "seed is -1: expected 0 <= seed < 2^31"),
    (TrainConfig, {"seq_len": 0}, "seq_len is 0: expected at least 1"),
]


@pytest.mark.parametrize(("kind", "values", "sentence"), REFUSED)
def test_impossible_settings_are_refused_in_one_sentence(kind, values, sentence):
    with pytest.raises(UserError) as refusal:
        kind(**values)
    assert str(refusal.value).startswith(sentence)
    assert "\n" not in str(refusal.value)


NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-3, 70) | st.floats()


def wild_settings(kind):
    """The numeric and boolean fields of a config, each with a strategy of wild values."""
    wild = {}
    for field in dataclasses.fields(kind):
        if isinstance(field.default, bool):
            wild[field.name] = st.booleans()
        elif isinstance(field.default, int | float) or field.name in ("n_kv_heads", "d_ff"):
            wild[field.name] = NUMBERS
    return st.fixed_dictionaries({}, optional=wild)


@pytest.mark.parametrize("kind", [ModelConfig, MeshConfig, TrainConfig])
@settings(max_examples=30)
@given(data=st.data())
def test_wild_values_raise_nothing_but_user_errors(kind, data):
    values = data.draw(wild_settings(kind))
    try:
        made = kind(**values)
    except UserError:
        return
    assert made == kind(**values)


def test_a_config_survives_json():
    for config in PRESETS.values():
        config = dataclasses.replace(config, seq_len=7, dtype="bfloat16", tokenizer="今天")
        assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("name", "layers", "heads", "width", "parameters"),
    [
        ("gpt2", 12, 12, 768, 124_439_808),
        ("gpt2-medium", 24, 16, 1024, 354_823_168),
        ("gpt2-large", 36, 20, 1280, 774_030_080),
        ("gpt2-xl", 48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2_presets_have_gpt2s_shapes(name, layers, heads, width, parameters):
    model = preset(name).model
    assert (model.n_layers, model.n_heads, model.d_model) == (layers, heads, width)
    assert (model.vocab_size, model.context_length) == (50257, 1024)
    assert (model.ff_width, model.kv_heads, model.bias) == (4 * width, heads, True)
    assert flops.parameters(model) == parameters


def test_presets_are_known_by_name():
    assert preset("tiny") is PRESETS["tiny"]
    with pytest.raises(UserError, match="no preset named 'gpt3': choose one of tiny, "):
        preset("gpt3")


def test_seq_len_sets_the_context():
    config = TrainConfig(seq_len=32)
    assert config.sequence_length == 32
    completed = config.completed(300, "float32")
    assert completed.sequence_length == completed.model.context_length == 32
    longer = dataclasses.replace(completed.model, context_length=64)
    assert dataclasses.replace(completed, model=longer).sequence_length == 64  # it is not set back


def test_types_left_open_are_filled():
    model = ModelConfig(cache_dtype="float32").computing_in("bfloat16")
    assert (model.param_dtype, model.compute_dtype, model.cache_dtype) == (
        "float32",
        "bfloat16",
        "float32",
    )
    assert ModelConfig(compute_dtype="float32").computing_in("bfloat16").cache_dtype == "float32"


@pytest.mark.parametrize("kind", [ModelConfig, MeshConfig, TrainConfig])
def test_every_field_is_read(kind):
    """Somewhere beside the checks of what it may be."""
    paths = [*(ROOT / "gpt").rglob("*.py"), *ROOT.glob("*.py")]
    source = "\n".join(path.read_text("utf-8") for path in paths)
    source = re.sub(r"def __post_init__.*?\n\n    (?=@|def )", "", source, flags=re.DOTALL)
    fields = [field.name for field in dataclasses.fields(kind)]
    assert [name for name in fields if not re.search(rf"\.{name}\b", source)] == []


def test_presets_of_2017_and_of_today():
    """Vaswani et al. 2017, Table 3, base; and about 125M weights with grouped heads."""
    old, new = PRESETS["transformer-2017"], PRESETS["modern"]
    c = old.model
    assert (c.n_layers, c.d_model, c.n_heads, c.ff_width, c.dropout) == (6, 512, 8, 2048, 0.1)
    assert (c.positions, c.norm_place, c.mlp, old.label_smoothing) == (
        *("sinusoidal", "post", "relu"),
        0.1,
    )
    c = new.model
    assert (c.positions, c.norm, c.mlp, c.qk_norm) == ("rope", "rms", "swiglu", True)
    assert c.kv_heads < c.n_heads and 115e6 < flops.parameters(c) < 135e6


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (ModelConfig, {"n_layers": 2.5}, "ModelConfig.n_layers is 2.5"),
        (ModelConfig, {"n_layers": True}, "ModelConfig.n_layers is True"),
        (ModelConfig, {"bias": 1}, "ModelConfig.bias is 1"),
        (ModelConfig, {"d_ff": "4"}, "ModelConfig.d_ff is '4'"),
        (ModelConfig, {"norm": ["rms"]}, "ModelConfig.norm is"),
        (TrainConfig, {"model": []}, "ModelConfig: expected a JSON object"),
        (TrainConfig, {"tokenizer": None}, "TrainConfig.tokenizer is None"),
        (TrainConfig, {"mesh": {"data": None}}, "data is None"),
        (TrainConfig, {"stepz": 1}, "stepz"),
        (TrainConfig, {"model": {"depth": 2}}, "depth"),
        (TrainConfig, [1], "expected a JSON object"),
    ],
)
def test_saved_values_of_another_shape_or_type_are_refused(kind, values, words):
    with pytest.raises(UserError, match=re.escape(words)):
        from_json(kind, values)
