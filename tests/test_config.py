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
    (ModelConfig, {"positions": "rope", "d_head": 5}, "heads of width 5 cannot be rotated"),
    (ModelConfig, {"positions": "sinusoidal", "d_model": 33, "d_head": 4}, "model.d_model is 33"),
    (ModelConfig, {"rope_low": 4.0}, "model.rope_high - model.rope_low is 0.0: expected"),
    (ModelConfig, {"norm_epsilon": float("nan")}, "model.norm_epsilon is nan"),
    (MeshConfig, {"tensor": -1}, "mesh (-1, 1, -1): expected positive sizes, at most one"),
    (TrainConfig, {"batch_size": 10, "grad_accum": 4}, "batch_size 10 is not divisible by"),
    (TrainConfig, {"min_learning_rate": 1.0}, "min_learning_rate is 1.0: expected between"),
    (TrainConfig, {"clip_norm": float("inf")}, "clip_norm is inf: expected zero or more"),
    (TrainConfig, {"seed": -1}, "seed is -1: expected 0 <= seed < 2^31"),
    # A value of another type.
    (ModelConfig, {"n_layers": 2.5}, "model.n_layers is 2.5: expected an integer"),
    (ModelConfig, {"n_layers": True}, "model.n_layers is True"),
    (ModelConfig, {"bias": 1}, "model.bias is 1: expected True or False"),
    (ModelConfig, {"d_ff": "4"}, "model.d_ff is '4': expected an integer or None"),
    (ModelConfig, {"norm": ["rms"]}, "model.norm is"),
    (TrainConfig, {"tokenizer": None}, "tokenizer is None"),
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
    ("name", "parameters"),
    {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }.items(),
)
def test_gpt2_presets_have_gpt2s_shapes(name, parameters):
    model = preset(name).model
    assert (model.context_length, model.head_width) == (1024, 64)
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
    assert (model.compute_dtype, model.cache_dtype) == ("bfloat16", "float32")
    assert ModelConfig(compute_dtype="float32").computing_in("bfloat16").cache_dtype == "float32"


@pytest.mark.parametrize("kind", [ModelConfig, MeshConfig, TrainConfig])
def test_every_field_is_read(kind):
    """Somewhere beside the checks of what it may be."""
    paths = [*(ROOT / "gpt").rglob("*.py"), *ROOT.glob("*.py")]
    source = "\n".join(path.read_text("utf-8") for path in paths)
    source = re.sub(r"def __post_init__.*?\n\n    (?=@|def )", "", source, flags=re.DOTALL)
    fields = [field.name for field in dataclasses.fields(kind)]
    assert [name for name in fields if not re.search(rf"\.{name}\b", source)] == []


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (TrainConfig, {"model": []}, "ModelConfig: expected a JSON object"),
        (TrainConfig, {"mesh": {"data": None}}, "mesh.data is None"),
        (TrainConfig, {"model": {"depth": 2}}, "ModelConfig has no field 'depth'"),
    ],
)
def test_saved_values_of_another_shape_are_refused(kind, values, words):
    with pytest.raises(UserError, match=re.escape(words)):
        from_json(kind, values)
