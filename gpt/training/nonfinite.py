"""Steps whose loss or gradient is no number: counted as they are skipped, and where it began.

`step.train_step` skips the update, on the device. Here the skipped steps in a row are counted, and
when there are too many the step is computed again, part by part, to find the first bad value.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from gpt import checkpoint
from gpt.config import ModelConfig, TrainConfig
from gpt.digest import named_leaves
from gpt.errors import Failed
from gpt.model import transformer
from gpt.training import train_step as steps
from gpt.training.loss import sequence_losses


class BadSteps:
    """Counts the skipped steps in a row. `skipped`: those before the first step, in all.

    `row`: how many; `first`: the first of them. Their number at a checkpoint is always zero.
    """

    def __init__(self, config: TrainConfig, skipped: int):
        self.config = config
        self.skipped, self.row, self.first = skipped, 0, 0

    @property
    def is_last_chance(self) -> bool:
        """Whether one more ends the run: the next must wait, or it changes what is looked at."""
        return self.row + 1 >= self.config.max_bad_steps

    def note(self, step: int, skipped: int) -> bool:
        """Step `step` is done, and by then `skipped` were skipped: whether the run must end.

        That is when too many were in a row, or where the last one was: no next one follows.
        """
        self.row = self.row + 1 if skipped > self.skipped else 0
        self.skipped = skipped
        self.first = step - self.row + 1
        return self.row > 0 and (self.row >= self.config.max_bad_steps or step == self.config.steps)


def diverged(
    config: TrainConfig, bad: BadSteps, out: Path, params: dict, batch: Callable
) -> Failed:
    """What to raise: the first step of those in a row, the layer, what is left and what to do.

    `batch`: the tokens of a step, from 0 on, [A, B, T+1].
    """
    step = bad.first - 1
    where = find_bad(config, params, batch(step), step)
    saved = checkpoint.steps(out)
    good = f"the last good checkpoint is step {saved[-1]}" if saved else "no checkpoint was saved"
    return Failed(
        f"step {bad.first}: the loss or a gradient is not finite, {bad.row} step(s) in a row; "
        f"{where}; {good}. Train on from its weights more slowly: --init-from {out} --out ANOTHER "
        "--learning-rate LOWER"
    )


def find_bad(config: TrainConfig, params: dict, tokens_ABU: jax.Array, step: int) -> str:
    """Where the first value stands that is not finite, when step number `step`, from 0 on, is
    computed on its batch: looked for in the weights, forward through the layers, and backward."""
    key_AB = steps.batch_keys(config, jnp.int32(step), *tokens_ABU.shape[:2])
    where = in_weights(params) or in_outputs(config.model, params, tokens_ABU, key_AB)
    return where or in_gradient(config, params, tokens_ABU, step)


def in_weights(params: dict) -> str:
    """The first weight that is not finite, as the layers are passed through; "" if all are."""
    found = bad_parts(params)
    return f"the first bad value is in the weights of {found[0]}" if found else ""


def in_outputs(config: ModelConfig, params: dict, tokens_ABU: jax.Array, key_AB) -> str:
    """The first layer whose output is not finite; "" if the loss is finite."""
    for n in range(config.n_layers + 1):
        if not passes(config, params, tokens_ABU, key_AB, n):
            layer = block(config.n_layers, n - 1) if n else "the embedding"
            return f"the first bad value is in the output of {layer}"
    finite = loss_is_finite(config, params, tokens_ABU, key_AB)
    return "" if finite else "the first bad value is in the output of the head"


def in_gradient(config: TrainConfig, params: dict, tokens_ABU: jax.Array, step: int) -> str:
    """The first weight whose gradient is not finite, as the layers are passed back through."""
    gradients = jax.jit(steps.gradients, static_argnums=0)
    found = bad_parts(gradients(config, params, tokens_ABU, jnp.int32(step))[1])
    if found:
        return f"the first bad value is in the gradient of {found[-1]}"
    return "all is finite when the step is computed again"


def bad_parts(tree: dict) -> list[str]:
    """The parts of a tree of stacked weights that are not finite, in the order of the layers."""
    found = []
    for path, finite in named_leaves(jax.device_get(look_at(tree))).items():
        if path.startswith("blocks/"):
            bad = [i for i, good in enumerate(finite) if not good]
            found += [(i, f"{block(len(finite), i)} ({path})") for i in bad]
        elif not finite:
            found.append((-1 if path in ("tokens", "positions") else 10**9, path))
    return [text for _, text in sorted(found)]


@jax.jit
def look_at(tree: dict) -> dict:
    """Whether each leaf is finite; of stacked ones each layer, bool [L]."""

    def layers(leaf):
        return jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))

    blocks = jax.tree.map(layers, tree["blocks"])
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree) | {"blocks": blocks}


def block(n_layers: int, i: int) -> str:
    """The name of block `i`."""
    return f"block {i} of 0 to {n_layers - 1}"


@partial(jax.jit, static_argnums=0)
def passes(config: ModelConfig, params: dict, tokens_ABU, key_AB, n: int) -> jax.Array:
    """Whether the residual stream is finite after the first `n` blocks.

    The weights of the others are taken as zero: such a block passes on what is bad, and makes
    nothing bad of its own.
    """
    runs = jnp.arange(config.n_layers) < n

    def silence(leaf):
        return jnp.where(runs.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)

    silent = params | {"blocks": jax.tree.map(silence, params["blocks"])}

    def look(micro):
        tokens_BU, key_B = micro
        x_BTD, _ = transformer.hidden(config, silent, tokens_BU[:, :-1], key_B=key_B)
        return jnp.isfinite(x_BTD).all()

    return jax.lax.map(look, (tokens_ABU, key_AB)).all()


@partial(jax.jit, static_argnums=0)
def loss_is_finite(config: ModelConfig, params: dict, tokens_ABU, key_AB) -> jax.Array:
    """Whether the loss of every token is finite."""

    def look(micro):
        losses = sequence_losses(config, params, *micro)
        return jnp.array([jnp.isfinite(loss_BT).all() for loss_BT in losses[:2]]).all()

    return jax.lax.map(look, (tokens_ABU, key_AB)).all()
