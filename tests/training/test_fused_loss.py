"""The loss of accelerators, here on the CPU: against all logits in float32, after some training."""

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
from gpt.training import fused_loss, loss

MODEL = ModelConfig(300, context_length=16, n_layers=2, n_heads=2, d_model=32)  # 384 padded rows
CONFIG = TrainConfig(model=MODEL, batch_size=8)
AIMS = {
    "plain": CONFIG,
    "smoothed": dataclasses.replace(CONFIG, label_smoothing=0.1),
    "z-loss": dataclasses.replace(CONFIG, z_loss=0.01),
    "capped": dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, logit_softcap=5.0)),
}
TOKENS = np.random.default_rng(0).integers(300, size=(7, 16)).astype(np.int32)
N_TOKENS = 7 * 15  # predicted; no power of two divides it


@pytest.fixture(scope="module")
def learned():
    """Weights that know half of the batch almost by heart: its losses are near 0, others' high."""
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, moments):
        gradient = jax.grad(lambda params: loss.objective(CONFIG, params, TOKENS[:4])[0])
        updates, moments = optimizer.update(gradient(params), moments)
        return optax.apply_updates(params, updates), moments

    params = transformer.init(MODEL, jax.random.key(0))
    moments = optimizer.init(params)
    for _ in range(60):
        params, moments = update(params, moments)
    return params


def textbook(config: TrainConfig, params: dict) -> tuple[jax.Array, jax.Array]:
    """What training minimises and the cross-entropy, from all logits in float32."""
    logits = transformer.forward(config.model, params, TOKENS[:, :-1])
    logp = jax.nn.log_softmax(logits, axis=-1)
    e = config.label_smoothing
    targets = jax.nn.one_hot(TOKENS[:, 1:], 300)
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


@pytest.mark.parametrize("name", AIMS)
def test_it_is_the_textbooks_in_float32(name, learned, monkeypatch):
    """To rounding, through the whole model, in one chunk and in eight, of which one is not full."""
    config = AIMS[name]
    expected = values_and_gradient(functools.partial(textbook, config))(learned)
    monkeypatch.setattr(loss.sharding, "platform", lambda: "an accelerator")
    for n_chunks in (1, 8):
        monkeypatch.setattr(fused_loss, "LOGITS_BYTES", N_TOKENS * 384 * 4 // n_chunks)
        objective = functools.partial(loss.objective, config, tokens_BU=TOKENS)
        found = values_and_gradient(objective)(learned)
        for x, y in zip(found, expected, strict=True):
            assert relative_error(x, y) < 1e-5


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
            return fused_loss.mean_losses(config, x, arrays["table"], target_M)

        return values_and_gradient(objective)(arrays)

    for x, y, bound in zip(by("bfloat16"), by("float32"), (2e-3, 2e-3, 1e-2), strict=True):
        assert relative_error(x, y) < bound


def test_only_a_chunk_of_logits_exists(monkeypatch):
    """Of 50,304 rows; nor is anything scattered into them."""
    monkeypatch.setattr(loss.sharding, "platform", lambda: "an accelerator")
    monkeypatch.setattr(fused_loss, "LOGITS_BYTES", N_TOKENS * 50_304 * 4 // 4)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=50_257))
    gradient = jax.grad(functools.partial(loss.objective, config), has_aux=True)
    params = transformer.abstract(config.model)
    jaxpr = str(jax.make_jaxpr(gradient)(params, TOKENS))
    assert "f32[27,50304]" in jaxpr and f"[{N_TOKENS},50304]" not in jaxpr
    scattered = re.findall(r"(\w+\[[\d,]+\]) = scatter", jaxpr)
    assert not any("27,50304" in shape for shape in scattered)
