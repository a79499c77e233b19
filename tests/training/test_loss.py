"""The loss in chunks, as a CPU and as accelerators compute it: against all logits in float32."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from gpt.config import ModelConfig, TrainConfig
from gpt.model import transformer
from gpt.training import fused_loss, loss, step_functions, train_state

MODEL = ModelConfig(300, context_length=16, n_layers=2, n_heads=2, d_model=32)  # 384 padded rows
CONFIG = TrainConfig(model=MODEL, batch_size=8)
AIMS = {
    "plain": CONFIG,
    "smoothed": dataclasses.replace(CONFIG, label_smoothing=0.1),
    "z-loss": dataclasses.replace(CONFIG, z_loss=0.01),
    "capped": dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, logit_softcap=5.0)),
}
ALL_TOKENS = np.random.default_rng(0).integers(300, size=(8, 17)).astype(np.int32)
TOKENS = ALL_TOKENS[:7, :16]
N_TOKENS = 7 * 15  # predicted; no power of two divides it
ON_CPU = {  # rows of the vocabulary in a chunk, logits that may be kept, devices that share a chunk
    "chunks": (64, 0, 1),
    "one chunk": (1000, 0, 1),
    "all kept": (128, 2**25, 1),
    "of two devices": (64, 0, 2),
}


@pytest.fixture(scope="module")
def learned():
    """Weights that know half of the batch almost by heart: its losses are near 0, others' high."""
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, moments):
        gradient = jax.grad(lambda params: step_functions.objective(CONFIG, params, TOKENS[:4])[0])
        updates, moments = optimizer.update(gradient(params), moments)
        return optax.apply_updates(params, updates), moments

    params = transformer.init(MODEL, jax.random.key(0))
    moments = optimizer.init(params)
    for _ in range(60):
        params, moments = update(params, moments)
    return params


def textbook(config: TrainConfig, tokens, params: dict) -> tuple[jax.Array, jax.Array]:
    """What training minimises and the cross-entropy, from all logits in float32."""
    logits = transformer.forward(config.model, params, tokens[:, :-1])
    logp = jax.nn.log_softmax(logits, axis=-1)
    e = config.label_smoothing
    targets = jax.nn.one_hot(tokens[:, 1:], 300)
    aim = -((targets * (1 - e) + e / 300) * logp).sum(-1)
    aim += config.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return aim.mean(), -(targets * logp).sum(-1).mean()


def values_and_gradient(objective):
    """A function of weights: the objective, the loss in nats, and the gradient as one vector."""

    @jax.jit
    def evaluate(params):
        (aim, nats), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return aim, nats, ravel_pytree(gradient)[0]

    return evaluate


def relative_error(x, expected) -> float:
    return float(jnp.linalg.norm(x - expected) / jnp.linalg.norm(expected))


def agrees(config, params, tokens) -> bool:
    """Whether the objective, the loss in nats and the gradient are the textbook's, to rounding."""
    expected = values_and_gradient(functools.partial(textbook, config, tokens))(params)
    objective = functools.partial(step_functions.objective, config, tokens_BU=tokens)
    found = values_and_gradient(objective)(params)
    return all(relative_error(x, y) < 1e-5 for x, y in zip(found, expected, strict=True))


WAYS = [("plain", way) for way in ON_CPU] + [(aim, "chunks") for aim in AIMS if aim != "plain"]


@pytest.mark.parametrize(("aim", "way"), WAYS)
def test_on_a_cpu_it_is_the_textbooks(aim, way, learned, monkeypatch):
    rows, kept, parts = ON_CPU[way]
    monkeypatch.setattr(loss.sharding, "count_parts", lambda axis: parts)
    monkeypatch.setattr(loss, "CHUNK_ROWS", rows)
    monkeypatch.setattr(loss, "KEPT_LOGITS", kept)
    assert agrees(AIMS[aim], learned, ALL_TOKENS)


@pytest.mark.parametrize(("aim", "n_chunks"), [("plain", 1), *((aim, 8) for aim in AIMS)])
def test_on_an_accelerator_it_is_the_textbooks(aim, n_chunks, learned, monkeypatch):
    """In one chunk, and in eight, of which one is not full."""
    monkeypatch.setattr(loss.sharding, "platform", lambda: "an accelerator")
    monkeypatch.setattr(fused_loss, "LOGITS_BYTES", N_TOKENS * 384 * 4 // n_chunks)
    assert agrees(AIMS[aim], learned, TOKENS)


@pytest.mark.parametrize("name", AIMS)
def test_bfloat16_logits_cost_little(name, learned):
    """The same hidden states and table, with logits and their gradient rounded to 8 bits."""
    config = AIMS[name]
    model = transformer.bind(config.model, learned)
    x_BTD, _ = model.hidden(TOKENS[:, :-1])
    x_MD, target_M = x_BTD.reshape(N_TOKENS, -1).astype("bfloat16"), TOKENS[:, 1:].ravel()

    def by(x_type):
        """The losses of the head alone, its products in `x_type`."""
        bf16_table = learned["tokens"].astype("bfloat16").astype("float32")
        arrays = {"x": x_MD.astype(x_type).astype("float32"), "table": bf16_table}

        def objective(arrays):
            x = arrays["x"].astype(x_type)
            return fused_loss.objective_and_loss(config, x, arrays["table"], target_M)

        return values_and_gradient(objective)(arrays)

    for x, y, bound in zip(by("bfloat16"), by("float32"), (2e-3, 2e-3, 1e-2), strict=True):
        assert relative_error(x, y) < bound


def test_only_a_chunk_of_logits_exists(monkeypatch):
    """Of 50,304 rows; nor is anything scattered into them."""
    monkeypatch.setattr(loss.sharding, "platform", lambda: "an accelerator")
    monkeypatch.setattr(fused_loss, "LOGITS_BYTES", N_TOKENS * 50_304 * 4 // 4)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=50_257))
    gradient = jax.grad(functools.partial(step_functions.objective, config), has_aux=True)
    params = transformer.abstract(config.model)
    jaxpr = str(jax.make_jaxpr(gradient)(params, TOKENS))
    assert "f32[27,50304]" in jaxpr and f"[{N_TOKENS},50304]" not in jaxpr
    scattered = re.findall(r"(\w+\[[\d,]+\]) = scatter", jaxpr)
    assert not any("27,50304" in shape for shape in scattered)


@pytest.mark.parametrize("kept", [0, 2**25])
def test_full_logits_never_exist_where_they_are_many(monkeypatch, kept):
    """No float32 array of [tokens, vocabulary] stands in the traced step of a GPT-2 vocabulary;
    where they are few, all chunks are kept side by side."""
    monkeypatch.setattr(loss, "KEPT_LOGITS", kept)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=50257))
    tokens = np.zeros((1, 8, 17), np.int32)
    state = jax.eval_shape(lambda: train_state.fresh_state(config))
    jaxpr = str(jax.make_jaxpr(lambda s, t: step_functions.train_step(config, s, t))(state, tokens))
    n_tokens = 8 * 16
    assert f"f32[{n_tokens},{50304 // 4}]" in jaxpr
    assert f"[{n_tokens},50304]" not in jaxpr and f"[{n_tokens},50257]" not in jaxpr
    assert (f"f32[4,{n_tokens},{50304 // 4}]" in jaxpr) == bool(kept)
