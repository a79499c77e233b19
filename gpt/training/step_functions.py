"""The training step and the evaluation step: pure functions, and their compilation for a mesh.

Gradients are averaged over devices in two ways. Over `data`, each device averages over its own rows
of all micro-batches, and a single all-reduce at the end of the step averages over devices (if
`reduces_over_data_once`). Over `fsdp` and `tensor`, the compiler inserts the collectives in every
micro-batch; only fused_loss.py has its own, for the gradient of the output head.

Shape letters as in gpt/model/transformer.py; A micro-batches of one step, U = T + 1 tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt import sharding
from gpt.config import TrainConfig
from gpt.errors import require
from gpt.model import flash_attention, transformer
from gpt.training import fused_loss, memory_plan
from gpt.training.loss import add_regularizers, hidden_states_and_targets, token_loss_terms
from gpt.training.optimizer import make_optimizer, make_schedule
from gpt.training.train_state import TrainState, abstract_state, shardings_of


def train_step(
    config: TrainConfig, state: TrainState, tokens_ABU: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one optimizer step on `tokens_ABU`, and its metrics.

    If the loss or a gradient is not finite, the update is skipped: only `step` advances, and the
    schedule and the moments stay put.
    Metrics: `loss` (nats per token), `grad_norm` (before clipping), `learning_rate`, `skipped`
    (updates skipped so far, int32).
    """
    loss, grads = loss_and_gradients(config, state.params, tokens_ABU, state.step)
    grad_norm = optax.tree.norm(grads)

    def update(state: TrainState) -> TrainState:
        optimizer = make_optimizer(config)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(config, state.ema_params, params, state.step)
        return TrainState(params, opt_state, state.step, ema_params)

    # `cond` lets a CPU update in place; `where` would keep both states in memory. On a GPU `cond`
    # waits for the host, so there `where` selects each array.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if sharding.platform() == "cpu":
        next_state = jax.lax.cond(finite, update, lambda state: state, state)
    else:
        next_state = jax.tree.map(partial(jnp.where, finite), update(state), state)

    step = state.step + 1
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": make_schedule(config)(count_updates(state.opt_state)),
        "skipped": step - count_updates(next_state.opt_state),
    }
    return dataclasses.replace(next_state, step=step), metrics


def loss_and_gradients(
    config: TrainConfig, params: dict, tokens_ABU: jax.Array, step: jax.Array
) -> tuple[jax.Array, dict]:
    """The mean cross-entropy in nats per token over all micro-batches and devices, and the gradient
    of the training objective."""
    dropout_key_AB = dropout_keys(config, step, *tokens_ABU.shape[:2])
    mesh = sharding.mesh_in_force()
    if mesh is None or not reduces_over_data_once(config, mesh.shape, sharding.platform()):
        return loss_and_gradients_of_rows(config, params, tokens_ABU, dropout_key_AB)

    def mean_over_devices(params, tokens_ABU, dropout_key_AB):
        own_mean = loss_and_gradients_of_rows(config, params, tokens_ABU, dropout_key_AB)
        return jax.lax.pmean(own_mean, "data")

    # The compiler still splits arrays over the axes not listed here. Axes of size 1 are listed too,
    # because the compiler cannot split cuDNN's attention.
    manual_axes = {axis for axis, size in mesh.shape.items() if axis == "data" or size == 1}
    replicated = PartitionSpec()
    by_row = PartitionSpec(None, "data")
    return jax.shard_map(
        mean_over_devices,
        in_specs=(replicated, by_row, by_row),
        out_specs=replicated,
        axis_names=manual_axes,
        check_vma=False,  # True would all-reduce every micro-batch's gradient immediately
    )(params, tokens_ABU, dropout_key_AB)


def reduces_over_data_once(config: TrainConfig, sizes: Mapping[str, int], platform: str) -> bool:
    """Whether gradients cross `data` only once, at the end of a step, on a mesh of these sizes.

    The two exceptions are limitations of XLA, described in docs/parallelism.md.
    """
    if sizes["fsdp"] > 1 and sizes["tensor"] > 1:
        return False
    if platform == "tpu" and sizes["tensor"] > 1 and config.remat != "blocks":
        return False
    return sizes["data"] > 1


def loss_and_gradients_of_rows(
    config: TrainConfig, params: dict, tokens_ABU: jax.Array, dropout_key_AB: jax.Array | None
) -> tuple[jax.Array, dict]:
    """The mean loss and gradient over these rows only, accumulated in float32.

    `dropout_key_AB`: one dropout key per row.
    """
    A = len(tokens_ABU)

    def share_of_loss(params, tokens_BU, dropout_key_B):
        minimized, loss = objective(config, params, tokens_BU, dropout_key_B)
        return minimized / A, loss / A

    gradient = jax.value_and_grad(share_of_loss, has_aux=True)
    if A == 1:
        dropout_key_B = None if dropout_key_AB is None else dropout_key_AB[0]
        (_, loss), grads = gradient(params, tokens_ABU[0], dropout_key_B)
        return loss, grads

    def add_micro_batch(total, micro_batch):
        (_, loss), grads = gradient(params, *micro_batch)
        return jax.tree.map(jnp.add, total, (loss, grads)), None

    zero_grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    total, _ = jax.lax.scan(
        add_micro_batch, (jnp.zeros(()), zero_grads), (tokens_ABU, dropout_key_AB)
    )
    return total


def objective(
    config: TrainConfig, params: dict, tokens_BU: jax.Array, dropout_key_B: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """What training minimizes, and the plain cross-entropy in nats, both averaged over tokens.

    Computed by loss.py on a CPU, in chunks of the vocabulary, and by fused_loss.py elsewhere, in
    chunks of tokens.
    """
    model = transformer.bind(config.model, params)
    x_MD, target_M = hidden_states_and_targets(config, model, tokens_BU, dropout_key_B)
    if sharding.platform() != "cpu":
        return fused_loss.objective_and_loss(config, x_MD, model.head_table, target_M)
    loss_M, log_normalizer_M, smoothing_loss_M = token_loss_terms(model, x_MD, target_M)
    objective_M = add_regularizers(config, loss_M, log_normalizer_M, smoothing_loss_M)
    return objective_M.mean(), loss_M.mean()


def eval_step(config: TrainConfig, params: dict, tokens_BU: jax.Array, weight_BT: jax.Array):
    """The loss in nats summed over the targets with their weights, and the sum of the weights."""
    config = dataclasses.replace(config, unroll=False)  # unrolling would only slow compilation
    model = transformer.bind(config.model, params)
    loss_M, *_ = token_loss_terms(model, *hidden_states_and_targets(config, model, tokens_BU))
    losses_BT = loss_M.reshape(weight_BT.shape)
    return jnp.sum(losses_BT * weight_BT), jnp.sum(weight_BT)


def dropout_keys(config: TrainConfig, step: jax.Array, A: int, B: int) -> jax.Array | None:
    """A dropout key for each row of A micro-batches of B rows, [A, B]; None without dropout.

    A key depends on the seed, the step and the row's place in the whole batch, so masks are the
    same for any number of micro-batches and devices.
    """
    if not config.model.dropout:
        return None
    step_key = jax.random.fold_in(jax.random.key(config.seed), step)
    keys = jax.vmap(partial(jax.random.fold_in, step_key))(jnp.arange(A * B))
    return keys.reshape(A, B)


def update_ema(config: TrainConfig, ema_params: dict, params: dict, step: jax.Array) -> dict:
    """The moving average of the weights, with `params` mixed in. Its decay is at most
    step / (step + 9), so the weights of the first steps are soon forgotten."""
    if not config.ema_decay:
        return {}
    decay = jnp.minimum(config.ema_decay, step / (step + 9))
    return jax.tree.map(
        lambda ema, p: ema + (1 - decay).astype(ema.dtype) * (p.astype(ema.dtype) - ema),
        ema_params,
        params,
    )


def count_updates(opt_state: optax.OptState) -> jax.Array:
    """The number of updates the optimizer has made, int32: steps minus skipped ones."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def require_even_split(config: TrainConfig, mesh: Mesh) -> list[str]:
    """Raise UserError unless weights and micro-batches divide evenly over the mesh. Return a note
    for everything that is kept whole on each device."""
    model = config.model
    notes = transformer.require_even_split(model, mesh)
    if config.attention == "fused":
        shape = (1, config.sequence_length, model.n_heads, model.head_width)
        with sharding.on_mesh(mesh):
            kernel = flash_attention.kernel_for(jax.ShapeDtypeStruct(shape, model.compute_dtype))
            is_reproducible = sharding.platform() != "gpu"
        require(
            kernel is not None and model.dropout == 0,
            "--attention fused: no kernel fits; there is one on NVIDIA GPUs from Ampere on and on "
            "TPUs, for --dtype bfloat16, --model.dropout 0 and heads whose width is a multiple of "
            "8, up to 128 (256 on Hopper); on a CPU for sequences of 256 tokens or more, a "
            "multiple of 4, and --model.dropout 0",
        )
        require(
            is_reproducible or not config.deterministic,
            "--attention fused cannot be combined with --deterministic on a GPU, where the "
            "gradient of cuDNN's attention fails: drop one of them",
        )
    n_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.batch_size // config.grad_accum
    require(
        rows % n_shards == 0,
        f"a micro-batch of {rows} sequences (--batch-size / --grad-accum) does not divide among "
        f"{n_shards} devices (--mesh.data x --mesh.fsdp)",
    )
    return notes


def compile_train_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Compiled:
    """Compile `train_step` ahead of time, without allocating an array. It donates its state."""
    config = memory_plan.resolve_auto(config, mesh)  # no effect if the caller has chosen
    state = abstract_state(config, mesh)
    shape = (config.grad_accum, config.batch_size // config.grad_accum, config.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.rows(mesh, axis=1))
    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        partial(train_step, config),
        donate_argnums=0,
        out_shardings=(shardings_of(state), replicated),
    )
    with sharding.on_mesh(mesh):
        return step.lower(state, tokens).compile()


def compile_steps(config: TrainConfig, mesh: Mesh) -> tuple[Callable, Callable]:
    """`train_step(state, tokens_ABU)`, which donates its state, and
    `eval_step(params, tokens_BU, weight_BT)`, which takes host arrays.

    The training step is compiled here, the evaluation step on its first call. Raises UserError if a
    device has too little memory.
    """
    compiled = compile_train_step(config, mesh)
    memory_plan.require_room(memory_plan.need_of(compiled))

    rows = sharding.rows(mesh)
    jitted_eval_step = jax.jit(
        partial(eval_step, config),
        in_shardings=(shardings_of(abstract_state(config, mesh).params), rows, rows),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

    def run_eval_step(params: dict, *arrays):
        with sharding.on_mesh(mesh):
            placed = [
                jax.make_array_from_callback(array.shape, rows, array.__getitem__)
                for array in arrays
            ]
            return jitted_eval_step(params, *placed)

    return compiled, run_eval_step
