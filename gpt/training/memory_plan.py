"""The memory that a training step takes of a device, before any array is allocated.

Bytes are those of one device unless said otherwise. XLA plans every buffer of a program when it
compiles it, so the memory of a training step is known without running it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from gpt import flops, hardware
from gpt.config import TrainConfig
from gpt.errors import UserError, is_out_of_memory, require

MIB, GIB = 2**20, 2**30
ADVICE = "raise --grad-accum, or lower --batch-size, --seq-len, --model.d-model, --model.n-layers"


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one device that a training step takes.

    `state`: what the step is given: weights, optimizer state, average, batch. What it returns takes
    the place of that. `temporary`: what lives within the step: gradients and activations.
    """

    state: float
    temporary: float

    @property
    def total(self) -> float:
        return self.state + self.temporary


def need_of(compiled: jax.stages.Compiled) -> Need:
    """What XLA has planned for a compiled step, on one device."""
    plan = compiled.memory_analysis()
    state = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Need(state, plan.temp_size_in_bytes)


def least_need(config: TrainConfig, mesh: Mesh) -> Need:
    """What a step takes at the very least: the state, the gradients, and each block's input for the
    device's share of a micro-batch."""
    model = config.model
    weight_shards = mesh.size // mesh.shape["data"]
    weights = flops.weight_bytes(model)
    state = weights + optimizer_bytes(config)
    if config.ema_decay:
        state += weights

    tokens = config.batch_size // config.grad_accum * config.sequence_length
    item_bytes = flops.ITEM_BYTES[model.compute_dtype or "float32"]
    batch_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    block_inputs = tokens * model.d_model * model.n_layers * item_bytes // batch_shards
    return Need(state // weight_shards, weights // weight_shards + block_inputs)


def optimizer_bytes(config: TrainConfig) -> int:
    """Bytes of the optimizer's moments over all devices: two per weight, but Muon keeps one for a
    matrix of a block."""
    model = config.model
    n_moments = 2 * (flops.weight_bytes(model) // flops.ITEM_BYTES[model.param_dtype])
    if config.optimizer == "muon":
        n_moments -= model.n_layers * flops.block_matrices(model)
    return n_moments * flops.ITEM_BYTES["float32"]


def require_room(need: Need) -> None:
    """Raise UserError if a step takes more than a device has: a CPU process would be killed."""
    limit, source = hardware.memory()
    require(
        need.total <= limit,
        f"out of memory: a step takes {format_bytes(need.total)}, of which weights and optimizer "
        f"are {format_bytes(need.state)}, and there are {format_bytes(limit)} ({source}): {ADVICE}",
    )


@contextlib.contextmanager
def explain_out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory inside into a UserError that names the flags to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows = config.batch_size // config.grad_accum
        raise UserError(
            f"out of memory with micro-batches of {rows:,} sequences of "
            f"{config.sequence_length:,} tokens: {ADVICE}; --dry-run tells what fits"
        ) from None


def format_bytes(n_bytes: float) -> str:
    """Bytes as people read them."""
    if n_bytes >= GIB:
        return f"{n_bytes / GIB:,.2f} GiB"
    return f"{n_bytes / MIB:,.1f} MiB"
