"""Find the first bad value in a step whose loss or gradient is not finite.

The training step itself skips such a step's update, on the device. After too many in a row the run
ends, and the first of them is recomputed part by part.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from gpt import checkpoint
from gpt.config import ModelConfig, TrainConfig
from gpt.digest import named_leaves
from gpt.errors import Failed
from gpt.model import transformer
from gpt.training.step_functions import dropout_keys, loss_and_gradients
from gpt.wording import counted


def explain_divergence(
    config: TrainConfig, first_bad: int, n_steps: int, out: Path, params: dict, tokens_ABU
) -> Failed:
    """The error that ends the run: which step and layer, the last good checkpoint, what to do.

    `first_bad`: the first of `n_steps` bad steps; its batch was `tokens_ABU`.
    """
    where = locate_first_nonfinite(config, params, tokens_ABU, first_bad - 1)
    saved = checkpoint.saved_steps(out)
    last_good = "no checkpoint was saved"
    if saved:
        last_good = f"the last good checkpoint is step {saved[-1]}"
    return Failed(
        f"step {first_bad}: the loss or a gradient is not finite, {counted(n_steps, 'step')} "
        f"in a row; {where}; {last_good}. Start from its weights with a lower learning rate: "
        f"--init-from {out} --out ANOTHER --learning-rate LOWER"
    )


def locate_first_nonfinite(
    config: TrainConfig, params: dict, tokens_ABU: jax.Array, index: int
) -> str:
    """Where the first non-finite value arises in step `index`, counted from 0. Checks the weights,
    then goes forward through the layers, then backward through the gradients."""
    model = config.model
    last_layer = model.n_layers - 1
    dropout_key_AB = dropout_keys(config, jnp.int32(index), *tokens_ABU.shape[:2])

    bad_weights = nonfinite_parts(params)
    if bad_weights:
        return f"the first bad value is in the weights of {bad_weights[0]}"

    if not output_is_finite(model, params, tokens_ABU, dropout_key_AB, 0):
        return "the first bad value is in the output of the embedding"
    for layer in range(model.n_layers):
        if not output_is_finite(model, params, tokens_ABU, dropout_key_AB, layer + 1):
            return f"the first bad value is in the output of block {layer} of 0 to {last_layer}"
    loss, grads = jax.jit(loss_and_gradients, static_argnums=0)(
        config, params, tokens_ABU, jnp.int32(index)
    )
    if not jnp.isfinite(loss):
        return "the first bad value is in the output of the head"
    bad_gradients = nonfinite_parts(grads)
    if bad_gradients:
        return f"the first bad value is in the gradient of {bad_gradients[-1]}"
    return "all values are finite when the step is recomputed"


def nonfinite_parts(tree: dict) -> list[str]:
    """The non-finite parts of a tree of stacked weights, in layer order."""
    before_blocks = []
    in_blocks = []
    after_blocks = []
    for name, leaf in named_leaves(tree).items():
        if name.startswith("blocks/"):
            finite_L = jax.device_get(jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1))
            for layer in (~finite_L).nonzero()[0]:
                part = f"block {layer} of 0 to {len(finite_L) - 1} ({name})"
                in_blocks.append((layer, part))
        elif not jnp.isfinite(leaf).all():
            is_embedding = name.startswith(("tokens", "positions"))
            (before_blocks if is_embedding else after_blocks).append(name)
    return before_blocks + [part for _, part in sorted(in_blocks)] + sorted(after_blocks)


@partial(jax.jit, static_argnums=0)
def output_is_finite(
    config: ModelConfig, params: dict, tokens_ABU, dropout_key_AB, n_blocks
) -> jax.Array:
    """Whether the residual stream is finite after the first `n_blocks` blocks.

    The remaining blocks get zero weights, so they pass bad values on without adding any, and one
    compiled program serves every `n_blocks`.
    """
    is_used_L = jnp.arange(config.n_layers) < n_blocks
    zero_unused = jax.vmap(lambda is_used, layer: jnp.where(is_used, layer, 0))
    blocks = jax.tree.map(partial(zero_unused, is_used_L), params["blocks"])
    partial_params = params | {"blocks": blocks}

    def micro_batch_is_finite(micro_batch):
        tokens_BU, dropout_key_B = micro_batch
        x_BTD, _ = transformer.bind(config, partial_params).hidden(
            tokens_BU[:, :-1], dropout_key_B=dropout_key_B
        )
        return jnp.isfinite(x_BTD).all()

    return jax.lax.map(micro_batch_is_finite, (tokens_ABU, dropout_key_AB)).all()
