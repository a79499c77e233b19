"""Steps whose loss or gradient is not finite: counted, and where the first bad value arose.

The training step itself skips the update of such a step, on the device (train_step.py). When too
many follow one another the run ends, and the first of them is computed again, part by part.
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
from gpt.training.loss import sequence_losses
from gpt.training.train_step import dropout_keys, mean_gradients


class NonFiniteStreak:
    """Counts consecutive skipped steps. A checkpoint is only saved where `length` is 0.

    `skipped`: updates that were skipped before the first step, in all.
    """

    def __init__(self, config: TrainConfig, skipped: int):
        self.limit = config.max_bad_steps
        self.last_step = config.steps
        self.skipped = skipped
        self.length = 0
        self.first_step = 0

    @property
    def one_more_ends_the_run(self) -> bool:
        return self.length + 1 >= self.limit

    def add(self, step: int, skipped: int) -> bool:
        """Count `step`, by which `skipped` updates were skipped in all. Returns whether the run
        must end: too many in a row were skipped, or the last step was, which none can follow."""
        if skipped > self.skipped:
            self.length += 1
        else:
            self.length = 0
        self.skipped = skipped
        self.first_step = step - self.length + 1
        return self.length > 0 and (self.length >= self.limit or step == self.last_step)


def explain_divergence(
    config: TrainConfig, streak: NonFiniteStreak, out: Path, params: dict, batch: Callable
) -> Failed:
    """The error that ends the run: which step, which layer, what is left and what to do.

    `batch(index)`: the tokens of a step, counted from 0, [A, B, T+1].
    """
    index = streak.first_step - 1
    where = locate_first_nonfinite(config, params, batch(index), index)
    saved = checkpoint.steps(out)
    last_good = "no checkpoint was saved"
    if saved:
        last_good = f"the last good checkpoint is step {saved[-1]}"
    return Failed(
        f"step {streak.first_step}: the loss or a gradient is not finite, {streak.length} step(s) "
        f"in a row; {where}; {last_good}. Train on from its weights with a lower learning rate: "
        f"--init-from {out} --out ANOTHER --learning-rate LOWER"
    )


def locate_first_nonfinite(
    config: TrainConfig, params: dict, tokens_ABU: jax.Array, index: int
) -> str:
    """Where the first value that is not finite arises in step `index`, counted from 0: looked for
    in the weights, then forward through the layers, then backward in the gradients."""
    model = config.model
    key_AB = dropout_keys(config, jnp.int32(index), *tokens_ABU.shape[:2])

    bad_weights = nonfinite_parts(params)
    if bad_weights:
        return f"the first bad value is in the weights of {bad_weights[0]}"

    if not output_is_finite(model, params, tokens_ABU, key_AB, 0):
        return "the first bad value is in the output of the embedding"
    for layer in range(model.n_layers):
        if not output_is_finite(model, params, tokens_ABU, key_AB, layer + 1):
            return f"the first bad value is in the output of {block_name(model.n_layers, layer)}"
    if not loss_is_finite(model, params, tokens_ABU, key_AB):
        return "the first bad value is in the output of the head"

    gradients = jax.jit(mean_gradients, static_argnums=0)
    _, grads = gradients(config, params, tokens_ABU, jnp.int32(index))
    bad_gradients = nonfinite_parts(grads)
    if bad_gradients:
        return f"the first bad value is in the gradient of {bad_gradients[-1]}"
    return "all values are finite when the step is computed again"


def nonfinite_parts(tree: dict) -> list[str]:
    """The parts of a tree of stacked weights that are not finite, in the order of the layers."""
    before_blocks = []
    in_blocks = []
    after_blocks = []
    for name, finite in named_leaves(jax.device_get(finite_leaves(tree))).items():
        if name.startswith("blocks/"):
            for layer, good in enumerate(finite):
                if not good:
                    in_blocks.append((layer, f"{block_name(len(finite), layer)} ({name})"))
        elif not finite:
            is_embedding = name.startswith(("tokens", "positions"))
            (before_blocks if is_embedding else after_blocks).append(name)
    return before_blocks + [text for _, text in sorted(in_blocks)] + sorted(after_blocks)


@jax.jit
def finite_leaves(tree: dict) -> dict:
    """Whether each leaf is finite; for a stacked one whether each layer is, bool [L]."""

    def per_layer(leaf):
        return jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))

    blocks = jax.tree.map(per_layer, tree["blocks"])
    others = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)
    return others | {"blocks": blocks}


def block_name(n_layers: int, layer: int) -> str:
    return f"block {layer} of 0 to {n_layers - 1}"


@partial(jax.jit, static_argnums=0)
def output_is_finite(config: ModelConfig, params: dict, tokens_ABU, key_AB, n_blocks) -> jax.Array:
    """Whether the residual stream is finite after the first `n_blocks` blocks.

    The weights of the others are taken as zero: such a block passes on what is bad and adds nothing
    of its own, so one program serves every number of blocks.
    """
    used = jnp.arange(config.n_layers) < n_blocks

    def zero_unused(leaf):
        return jnp.where(used.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)

    partial_params = params | {"blocks": jax.tree.map(zero_unused, params["blocks"])}

    def micro_batch_is_finite(micro_batch):
        tokens_BU, key_B = micro_batch
        x_BTD, _ = transformer.bind(config, partial_params).hidden(tokens_BU[:, :-1], key_B=key_B)
        return jnp.isfinite(x_BTD).all()

    return jax.lax.map(micro_batch_is_finite, (tokens_ABU, key_AB)).all()


@partial(jax.jit, static_argnums=0)
def loss_is_finite(config: ModelConfig, params: dict, tokens_ABU, key_AB) -> jax.Array:
    """Whether the loss of every token is finite."""

    def micro_batch_is_finite(micro_batch):
        loss_BT, log_total_BT, _ = sequence_losses(config, params, *micro_batch)
        return jnp.isfinite(loss_BT).all() & jnp.isfinite(log_total_BT).all()

    return jax.lax.map(micro_batch_is_finite, (tokens_ABU, key_AB)).all()
