"""The optimizer, built from optax: schedules, parameter groups, clipping."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from gpt.config import TrainConfig

# Each linear kernel's input and output axes, counted from the end, since layers may be stacked.
KERNEL_AXES = {
    "q": MuonDimensionNumbers((-3,), (-2, -1)),
    "k": MuonDimensionNumbers((-3,), (-2, -1)),
    "v": MuonDimensionNumbers((-3,), (-2, -1)),
    "o": MuonDimensionNumbers((-3, -2), (-1,)),
    "up": MuonDimensionNumbers((-2,), (-1,)),
    "gate": MuonDimensionNumbers((-2,), (-1,)),
    "down": MuonDimensionNumbers((-2,), (-1,)),
}


def make_schedule(config: TrainConfig, peak: float | None = None) -> optax.Schedule:
    """Learning rate by step, counted from 0: a linear warm-up that starts above zero, then
    config.schedule down to the minimum, reached at the last step and kept after it.

    A warm-up as long as the run is shortened to end one step before the last. A `peak` other
    than config.learning_rate scales the whole schedule.
    """
    peak = config.learning_rate if peak is None else peak
    low = peak * config.min_learning_rate / config.learning_rate
    last_step = config.schedule_steps - 1
    warmup = min(config.warmup_steps, max(last_step - 1, 0))
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)

    rest_steps = max(last_step - warmup, 1)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, rest_steps, low / peak)
    else:
        falling = rest_steps
        if config.schedule == "wsd":
            falling = min(config.schedule_steps - config.decay_start, rest_steps)
        rest = optax.linear_schedule(peak, low, falling, rest_steps - falling)
    return optax.join_schedules([rise, rest], [warmup])


def decayed(params: dict) -> dict:
    """True for the weights to decay: matrices and tables, not biases and norms.

    Decided by name, since stacked biases have the rank of matrices.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale"), params
    )


def groups(params: dict) -> dict:
    """The groups: "muon" for the blocks' matrices, "adamw" for tables, head, norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if path[-1].key == "kernel" else "adamw", params
    )


def make_muon(config: TrainConfig) -> optax.GradientTransformation:
    """Momentum orthogonalized by Newton-Schulz steps (Jordan et al. 2024), layer by layer."""
    return muon(
        make_schedule(config, config.muon_learning_rate),
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=partial(
            jax.tree_util.tree_map_with_path, lambda path, _: KERNEL_AXES[path[-2].key]
        ),
    )


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with float32 moments and arithmetic, whatever the weights' dtype.

    In bfloat16, a moving average with a decay of 0.999 stands still: each increment rounds away.
    """
    widen = partial(optax.tree.cast, dtype=jnp.float32)
    return optax.GradientTransformation(
        init=lambda params: optimizer.init(widen(params)),
        update=lambda gradients, state, params: optimizer.update(
            widen(gradients), state, widen(params)
        ),
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW; or Muon for the blocks' matrices and AdamW for the rest."""
    # AdamW with decoupled decay (Loshchilov & Hutter 2019), for matrices and tables only.
    optimizer = optax.adamw(
        make_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.optimizer == "muon":
        optimizer = optax.partition({"muon": make_muon(config), "adamw": optimizer}, groups)
    clipping = optax.identity()
    if config.clip_norm:
        clipping = optax.clip_by_global_norm(config.clip_norm)
    return in_float32(optax.chain(clipping, optimizer))
