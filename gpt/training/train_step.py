"""One optimizer step and one evaluation step: pure functions, jitted, the state donated."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt import sharding
from gpt.config import TrainConfig
from gpt.data import batches
from gpt.data.token_files import Tokens
from gpt.errors import require
from gpt.model import transformer
from gpt.training import feed, memory_plan
from gpt.training.loss import objective, sequence_losses
from gpt.training.optimizer import make_optimizer, make_schedule


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes: stacked weights, optimizer state, steps done (int32).

    `average`: an exponential moving average of the weights; empty where none is kept.
    """

    params: dict
    optimizer: optax.OptState
    step: jax.Array
    average: dict


def stored(state: TrainState) -> dict[str, dict]:
    """The trees of a checkpoint of `state`, by name; the weights stand alone."""
    trees = {
        "params": state.params,
        "rest": {"optimizer": state.optimizer, "step": state.step},
    }
    return trees | ({"average": state.average} if state.average else {})


def fresh_state(config: TrainConfig) -> TrainState:
    """The state before the first step, a function of config.seed alone."""
    params = transformer.init(config.model, jax.random.key(config.seed))
    average = jax.tree.map(jnp.copy, params) if config.ema_decay else {}
    step = jnp.zeros((), jnp.int32)
    return TrainState(params, make_optimizer(config).init(params), step, average)


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state on `mesh`; nothing is computed."""
    abstract = jax.eval_shape(partial(fresh_state, config))
    axes = transformer.logical_axes(config.model)
    shardings = sharding.state_shardings(mesh, axes, abstract)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def require_fit(config: TrainConfig, mesh: Mesh) -> list[str]:
    """UserError unless weights and a micro-batch's rows divide evenly among the devices; a line
    for what is kept whole on each."""
    notes = transformer.require_fit(config.model, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.batch_size // config.grad_accum
    require(
        rows % shards == 0,
        f"a micro-batch of {rows} sequences (--batch-size / --grad-accum) does not divide among "
        f"{shards} devices (--mesh.data x --mesh.fsdp)",
    )
    return notes


def make_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """A fresh state, each array born on the devices that keep it."""
    with sharding.on_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
        return jax.jit(partial(fresh_state, config), out_shardings=shardings)()


def row_keys(seed: int, step: jax.Array, n_rows: int) -> jax.Array:
    """A dropout key for each row of the step's batch, whatever its micro-batch or device."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(n_rows))


def batch_keys(config: TrainConfig, step: jax.Array, A: int, B: int) -> jax.Array | None:
    """The rows' dropout keys for A micro-batches of B rows, [A, B]; None without dropout."""
    return row_keys(config.seed, step, A * B).reshape(A, B) if config.model.dropout else None


def gradients(config: TrainConfig, params: dict, tokens_ABU: jax.Array, step: jax.Array):
    """Mean cross-entropy in nats a token over all micro-batches A; the objective's gradient."""
    A, B = tokens_ABU.shape[:2]
    key_AB = batch_keys(config, step, A, B)

    def share(params, tokens_BU, key_B):
        aim, loss = objective(config, params, tokens_BU, key_B)
        return aim / A, loss / A

    gradient = jax.value_and_grad(share, has_aux=True)

    def micro(total, micro_batch):
        (_, loss), grads = gradient(params, *micro_batch)
        return jax.tree.map(jnp.add, total, (loss, grads)), None

    if A == 1:
        (_, loss), grads = gradient(params, tokens_ABU[0], None if key_AB is None else key_AB[0])
        return loss, grads
    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(micro, zeros, (tokens_ABU, key_AB))[0]


def averaged(config: TrainConfig, average: dict, params: dict, step: jax.Array) -> dict:
    """The average with `params` mixed in, faster at first: its decay is at most step/(step + 9)."""
    decay = jnp.minimum(config.ema_decay, step / (step + 9))
    return jax.tree.map(lambda a, p: a + (1 - decay).astype(a.dtype) * (p - a), average, params)


def count_updates(optimizer: optax.OptState) -> jax.Array:
    """Updates that this state of the optimizer has seen, int32."""
    return optax.tree.get_all_with_path(optimizer, "count")[0][1]


def train_step(config: TrainConfig, state: TrainState, tokens_ABU: jax.Array):
    """The state after one optimizer step on [A, B, T+1] tokens, and its metrics.

    Where the loss or a gradient is not finite only the number of steps changes: the update is
    skipped, and the learning rate waits with the moments.
    Metrics: `loss` (nats a token), `grad_norm` (before clipping), `learning_rate`, `skipped`
    (updates up to now, int32).
    """
    loss, grads = gradients(config, state.params, tokens_ABU, state.step)
    norm = optax.tree.norm(grads)

    def update(state: TrainState) -> TrainState:
        updates, optimizer = make_optimizer(config).update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = averaged(config, state.average, params, state.step) if config.ema_decay else {}
        return TrainState(params, optimizer, state.step, average)

    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    choices = {"cpu": partial(by_branch, update), "default": partial(by_choice, update)}
    kept = jax.lax.platform_dependent(good, state, **choices)
    step = state.step + 1
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": make_schedule(config)(count_updates(state.optimizer)),
        "skipped": step - count_updates(kept.optimizer),
    }
    return dataclasses.replace(kept, step=step), metrics


def by_branch(update: Callable, good: jax.Array, state: TrainState) -> TrainState:
    """`update(state)` where `good`: in place on a CPU, which for a choice keeps both."""
    return jax.lax.cond(good, update, lambda state: state, state)


def by_choice(update: Callable, good: jax.Array, state: TrainState) -> TrainState:
    """`update(state)` where `good`, leaf by leaf: a GPU waits for the host at each branch."""
    return jax.tree.map(partial(jnp.where, good), update(state), state)


def eval_step(config: TrainConfig, params: dict, tokens_BU: jax.Array, weight_BT: jax.Array):
    """Summed loss in nats and summed weight of the targets of a batch [B, T+1]."""
    losses_BT, *_ = sequence_losses(config.model, params, tokens_BU)
    return jnp.sum(losses_BT * weight_BT), jnp.sum(weight_BT)


def evaluate(config: TrainConfig, params: dict, eval_step: Callable, val: Tokens):
    """The loss on held-out text in nats a token, and in bits a byte; always the same windows."""
    rows = config.batch_size // config.grad_accum
    windows = batches.evaluation_windows(val, config.window, config.eval_tokens, rows)
    # One after another: on a CPU steps with collectives must not pile up.
    sums = [jax.device_get(eval_step(params, tokens, weights)) for tokens, weights in windows]
    loss = float(sum(total for total, _ in sums) / sum(n for _, n in sums))
    return loss, loss / math.log(2) * len(val) / val.n_bytes


def compile_train_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Compiled:
    """The training step, which consumes its state; no array is made for it."""
    state, replicated = abstract_state(config, mesh), NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    micro = (config.grad_accum, config.batch_size // config.grad_accum, config.window + 1)
    tokens = jax.ShapeDtypeStruct(micro, jnp.int32, sharding=sharding.rows(mesh, axis=1))
    out = (shardings, replicated)
    train = jax.jit(partial(train_step, config), donate_argnums=0, out_shardings=out)
    with sharding.on_mesh(mesh):
        return train.lower(state, tokens).compile()


def compile_steps(config: TrainConfig, mesh: Mesh) -> tuple[Callable, Callable]:
    """`train_step(state, tokens_ABU)`, which consumes its state, and `eval_step(params, ...)`,
    which takes its rows from the host.

    The training step is compiled here, ahead of time; evaluation when it is first called.
    UserError if a device has not the memory.
    """
    train = compile_train_step(config, mesh)
    memory_plan.require_room(memory_plan.need_of(train))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).params)
    rows, replicated = sharding.rows(mesh), NamedSharding(mesh, PartitionSpec())
    ins = (shardings, rows, rows)
    evaluate = jax.jit(partial(eval_step, config), in_shardings=ins, out_shardings=replicated)

    def evaluate_rows(params, *arrays):
        return evaluate(params, *(feed.place(rows, array) for array in arrays))

    def on_mesh(function):
        def call(*args):
            with sharding.on_mesh(mesh):
                return function(*args)

        return call

    return on_mesh(train), on_mesh(evaluate_rows)
