"""The plan: what a person wants to know before a run is started."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from gpt import flops, sharding
from gpt.config import MeshConfig, ModelConfig
from gpt.presets import PRESETS
from gpt.training import run_plan


@pytest.fixture
def said():
    """The plan of `tiny` with other settings, for a text of a million tokens, as one string."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

    def plan(steps=1, n_tokens=1_000_000, **of_model):
        config = PRESETS["tiny"].completed(4096, "float32")
        model = dataclasses.replace(config.model, **of_model)
        config = dataclasses.replace(config, model=model, steps=steps, grad_accum=1, remat="none")
        return "\n".join(run_plan.describe(config, mesh, SimpleNamespace(train=range(n_tokens))))

    return plan


def test_it_names_sizes_and_the_device(said):
    plan = said()
    assert "width 128, MLP 344, " in plan and "1 device: cpu" in plan
    assert "note: " not in plan


NOTES = [
    (
        {"steps": 20_000},  # of 2,048 tokens
        "41 passes over this text: expect the model to memorize it; use --steps 19532 for",
    ),
    ({"n_tokens": 100_000}, "python train.py shakespeare-char"),
    ({"bias": True}, "with --model.no-bias it would"),
    ({"positions": "none"}, "with --model.positions rope it would"),
    (
        {"positions": "learned", "norm": "layer"},
        "gpt.convert will not be able to export this model to transformers; "
        "with --model.mlp gelu_tanh --model.no-qk-norm it would",
    ),
    # Small updates are lost in weights of bfloat16; to compute in it costs nothing of the kind.
    ({"param_dtype": "bfloat16"}, "higher loss than with --model.param-dtype float32"),
    ({"compute_dtype": "bfloat16"}, None),
    ({"steps": 19_500}, None),
]


@pytest.mark.parametrize(("settings", "words"), NOTES)
def test_it_notes_what_a_person_should_know_before(said, settings, words):
    notes = [line for line in said(**settings).splitlines() if "note: " in line]
    assert len(notes) == (words is not None) and all(words in note for note in notes)


def test_a_wider_model_has_a_wider_mlp():
    """8/3 with a gate, so that it has as many weights as with 4 and none; a multiple of 8."""
    widths = [ModelConfig(d_model=d, mlp="swiglu").ff_width for d in (8, 128, 192, 768)]
    assert widths == [24, 344, 512, 2048] and ModelConfig(d_model=192).ff_width == 768
    assert all(config.model.d_ff is None for name, config in PRESETS.items() if name != "modern")


def test_other_programs_count_all_of_attention():
    assert flops.palm_factor(PRESETS["gpt2"].model) == pytest.approx(1.071, abs=1e-3)
