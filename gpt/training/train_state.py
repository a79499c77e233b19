"""Everything a training step changes: weights, optimizer state, step count."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt import checkpoint, sharding
from gpt.config import TrainConfig
from gpt.model import transformer
from gpt.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """`params`: stacked weights. `opt_state`: the optimizer's state. `step`: steps done, int32.

    `ema_params`: exponential moving average of the weights, float32; empty if none is kept.
    """

    params: dict
    opt_state: optax.OptState
    step: jax.Array
    ema_params: dict


def fresh_state(config: TrainConfig) -> TrainState:
    """The state before the first step, a function of `config.seed` alone."""
    params = transformer.init(config.model, jax.random.key(config.seed))
    return TrainState(
        params=params,
        opt_state=make_optimizer(config).init(params),
        step=jnp.zeros((), jnp.int32),
        ema_params=start_ema(config, params),
    )


def start_ema(config: TrainConfig, params: dict) -> dict:
    """The initial weight average: a float32 copy, since small increments would be lost in bfloat16.
    Empty if the config keeps no average."""
    if not config.ema_decay:
        return {}
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state on `mesh`; nothing is computed."""
    shapes = jax.eval_shape(partial(fresh_state, config))
    axes = transformer.logical_axes(config.model)
    return sharding.with_shardings(shapes, sharding.state_shardings(mesh, axes, shapes))


def shardings_of(tree):
    """The sharding of each array, or abstract array, in a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def make_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """A fresh state, with each array created on the devices that hold it."""
    with sharding.on_mesh(mesh):
        out_shardings = shardings_of(abstract_state(config, mesh))
        return jax.jit(partial(fresh_state, config), out_shardings=out_shardings)()


def checkpoint_trees(state: TrainState) -> dict[str, dict]:
    """The trees of a checkpoint of `state`, by name. The weights are a separate tree so that
    sampling can load them without the optimizer's state."""
    trees = {
        "params": state.params,
        "optimizer": {"opt_state": state.opt_state, "step": state.step},
    }
    if state.ema_params:
        trees["ema_params"] = state.ema_params
    return trees


def load_state(like: TrainState, folder: Path, step: int) -> TrainState:
    """The whole state saved at `step`, with the shapes and shardings of `like`."""
    wanted = {"opt_state": like.opt_state, "step": like.step}
    found = checkpoint.restore(folder, step, "optimizer", wanted)
    params = checkpoint.restore(folder, step, "params", like.params)
    ema_params = {}
    if like.ema_params:
        ema_params = checkpoint.restore(folder, step, "ema_params", like.ema_params)
    return TrainState(params, found["opt_state"], found["step"], ema_params)
