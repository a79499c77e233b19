"""The plan: what a person wants to know before a run is started, and what fits in memory."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt import flops, hardware, sharding
from gpt.config import MeshConfig, ModelConfig, TrainConfig
from gpt.errors import UserError
from gpt.presets import PRESETS, preset
from gpt.training import memory_plan, run_plan, step_functions, train_state


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
    (
        {"positions": "learned", "norm": "layer"},
        "gpt.convert cannot export this model to transformers; "
        "with --model.mlp gelu_tanh --model.no-qk-norm it could",
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


def test_other_programs_count_all_of_attention():
    assert flops.palm_factor(PRESETS["gpt2"].model) == pytest.approx(1.071, abs=1e-3)


# What fits in memory: the search, the refusal before memory is taken, the one message after.


MODEL = ModelConfig(300, context_length=32, n_layers=2, n_heads=2, d_model=32)
CONFIG = TrainConfig(model=MODEL, batch_size=8, steps=5, ema_decay=0.9)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def test_the_plan_agrees_with_the_arrays_themselves(mesh):
    """What XLA says it is given is weights, optimizer, average, step and batch, to the byte."""
    need = memory_plan.need_of(step_functions.compile_train_step(CONFIG, mesh))
    state = jax.tree.leaves(train_state.abstract_state(CONFIG, mesh))
    given = sum(leaf.size * leaf.dtype.itemsize for leaf in state) + 8 * 33 * 4
    assert given <= need.state < given + 1000  # and the metrics that come out
    assert need.temporary > flops.weight_bytes(MODEL)  # the gradients, and then activations


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_least_need_counts_the_state(dtype, mesh):
    """Moments and the average are in float32, whatever the weights are in."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, param_dtype=dtype))
    state = jax.tree.leaves(train_state.abstract_state(config, mesh))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    assert held - 100 < memory_plan.least_need(config, mesh).state <= held  # the step's number


def test_the_dry_run_tells_what_fits(mesh, monkeypatch):
    """With a step that takes 100 kB a row; tests/test_train.py plans with the compiled one."""

    def need_of(config):
        return memory_plan.Need(600_000, 100_000 * config.batch_size // config.grad_accum)

    monkeypatch.setattr(run_plan, "compile_train_step", lambda config, mesh: config)
    monkeypatch.setattr(run_plan, "need_of", need_of)
    few, more, none, here = lines = [], [], [], []
    for limit, log in zip((3e6, 3e7, 1e5, None), lines, strict=True):
        run_plan.print_memory(CONFIG, mesh, limit, log.append)
    assert "about 24 fit" in few[-1] and "about 294 fit" in more[-1]
    assert "(--memory-gb)" in few[-2] and few[-3].startswith("activations ")
    assert "none fits: raise --grad-accum" in none[-1] and "this machine's memory" in here[-2]


def many(platform, n_devices):
    """A mesh of so many devices over `data`, of which only the platform is known."""
    devices = np.full((n_devices, 1, 1), SimpleNamespace(platform=platform))
    shape = {"data": n_devices, "fsdp": 1, "tensor": 1}
    return SimpleNamespace(shape=shape, size=n_devices, devices=devices)


@pytest.mark.parametrize(
    ("name", "platform", "n_devices", "gigabytes", "remat", "grad_accum"),
    [
        ("gpt2", "gpu", 1, 64, "none", 4),
        ("gpt2", "gpu", 8, 64, "none", 1),
        ("gpt2", "tpu", 16, 16, "none", 2),  # 16 rows on a chip
        ("gpt2-large", "gpu", 1, 30, "none", 128),
        ("gpt2-large", "gpu", 1, 24, "products", 128),
        ("gpt2-large", "tpu", 16, 16, "blocks", 32),  # too little in any case: one row
        ("gpt2", "cpu", 1, 24, "blocks", 16),
    ],
)
def test_what_is_left_open_is_decided_by_memory(
    name, platform, n_devices, gigabytes, remat, grad_accum
):
    """Nothing is recomputed and micro-batches are few where that fits, else as little as fits."""
    config = preset(name).completed(50_257, "float32" if platform == "cpu" else "bfloat16")
    mesh, limit = many(platform, n_devices), gigabytes * 1e9
    chosen = memory_plan.resolve_auto(config, mesh, limit)
    assert (chosen.remat, chosen.grad_accum) == (remat, grad_accum)
    assert chosen.unroll == (remat == "none")
    assert memory_plan.resolve_auto(chosen, mesh) == chosen

    # What does not fit when it is compiled makes room for the next, down to the thriftiest.
    tried = [
        memory_plan.expected_need(one, mesh).total
        for one in memory_plan.likely_to_fit(config, mesh, limit)
    ]
    assert tried[-1] == min(tried) and len(tried) == len(set(tried))


def test_what_is_given_is_kept():
    config = dataclasses.replace(preset("gpt2"), grad_accum=8).completed(50_257, "bfloat16")
    assert memory_plan.resolve_auto(config, many("gpu", 1), 20e9).grad_accum == 8
    config = dataclasses.replace(config, grad_accum="auto", remat="products")
    chosen = memory_plan.resolve_auto(config, many("gpu", 1), 64e9)
    assert chosen.remat == "products" and not chosen.unroll and chosen.grad_accum == 4


@pytest.mark.parametrize("remat", ["none", "products", "blocks"])
def test_the_expected_need_is_near_the_compiled_one(mesh, remat):
    model = dataclasses.replace(MODEL, vocab_size=2048, context_length=256, d_model=64, n_layers=6)
    config = dataclasses.replace(
        CONFIG, model=model, batch_size=16, remat=remat, unroll=remat == "none"
    )
    expected = memory_plan.expected_need(config, mesh).total
    found = memory_plan.need_of(step_functions.compile_train_step(config, mesh)).total
    assert 0.6 * found < expected < 1.8 * found


def test_what_cannot_fit_is_refused_before_it_is_made_or_when_it_is_compiled(mesh, monkeypatch):
    memory_plan.require_room(memory_plan.least_need(CONFIG, mesh))
    monkeypatch.setattr(hardware, "memory", lambda: (10**5, "a small machine"))
    match = r"out of memory: .* \(a small machine\): raise --grad-accum"
    with pytest.raises(UserError, match=match):
        memory_plan.require_room(memory_plan.least_need(CONFIG, mesh))
    monkeypatch.setattr(hardware, "memory", lambda: (10**6, "a small machine"))
    memory_plan.require_room(memory_plan.least_need(CONFIG, mesh))
    with pytest.raises(UserError, match="--batch-size"):
        step_functions.compile_steps(CONFIG, mesh)


def test_running_out_of_memory_names_the_flags():
    """What XLA raises, what NumPy raises; any other error is our bug and stays."""
    for take in (lambda: jnp.zeros(10**13), lambda: bytearray(10**18)):
        match = "8 sequences of 32 tokens: raise --grad-accum"
        with pytest.raises(UserError, match=match), memory_plan.explain_out_of_memory(CONFIG):
            take()
    with pytest.raises(ZeroDivisionError), memory_plan.explain_out_of_memory(CONFIG):
        print(1 / 0)
