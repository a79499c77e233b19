"""The optimizer: schedule, decay mask, clipping, AdamW. Built from a TrainConfig by optax."""

import jax
import optax

from gpt.config import TrainConfig


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up, no step at zero, then a cosine to the minimum."""
    warmup = min(config.warmup_steps, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        config.learning_rate / (warmup + 1),
        config.learning_rate,
        warmup,
        config.steps,
        config.min_learning_rate,
    )


def decayed(params: dict) -> dict:
    """True for the weights that decay: matrices and tables, not biases and norms.

    By name: where layers are stacked, a bias has two axes like a matrix.
    """

    def is_matrix(path, _):
        name = path[-1].key
        return not (name.endswith("bias") or name == "scale")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def clipping(config: TrainConfig) -> optax.GradientTransformation:
    """Scales gradients down to the largest global norm; nothing where that is 0."""
    return optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW with decoupled decay (Loshchilov & Hutter 2019)."""
    adamw = optax.adamw(
        make_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(clipping(config), adamw)
