"""The memory a training step needs, known before any array is allocated.

Bytes are per device unless stated otherwise. XLA plans every buffer at compile time, so a step's
memory is known without running it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import Mesh
from rich import filesize

from gpt import flops, hardware
from gpt.config import AUTO, TrainConfig
from gpt.errors import UserError, is_out_of_memory, require
from gpt.model import blockwise_attention
from gpt.training import fused_loss
from gpt.training.loss import count_chunks

FEWEST_TOKENS = 4096  # per micro-batch and device, to keep an accelerator busy
MOST_MICRO_BATCHES = 4096  # the most that `auto` considers
MEMORY_ADVICE = (
    "raise --grad-accum, or lower --batch-size, --seq-len, --model.d-model, --model.n-layers"
)


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes a training step needs on one device.

    `state`: its arguments (weights, optimizer state, average, batch), which its results replace.
    `temporary`: gradients and activations, freed when the step ends.
    """

    state: float
    temporary: float

    @property
    def total(self) -> float:
        return self.state + self.temporary


def need_of(compiled: jax.stages.Compiled) -> Need:
    """The memory XLA planned for a compiled step."""
    plan = compiled.memory_analysis()
    state = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Need(state, plan.temp_size_in_bytes)


def least_need(config: TrainConfig, mesh: Mesh) -> Need:
    """A lower bound on a step's need: the state, the gradients, and each block's input for the
    device's share of a micro-batch."""
    model = config.model
    weight_shards = mesh.size // mesh.shape["data"]
    weights = flops.weight_bytes(model)
    state = weights + optimizer_bytes(config)
    if config.ema_decay:
        state += flops.weight_bytes(model, "float32")

    tokens = config.batch_size // config.grad_accum * config.sequence_length
    item_bytes = flops.ITEM_BYTES[model.compute_dtype or "float32"]
    batch_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    block_inputs = tokens * model.d_model * model.n_layers * item_bytes // batch_shards
    return Need(state // weight_shards, weights // weight_shards + block_inputs)


def resolve_auto(config: TrainConfig, mesh: Mesh, limit: float | None = None) -> TrainConfig:
    """`config` with its `auto` settings resolved: the first of `likely_to_fit`."""
    return likely_to_fit(config, mesh, limit)[0]


def likely_to_fit(config: TrainConfig, mesh: Mesh, limit: float | None = None) -> list[TrainConfig]:
    """The `candidates` expected to fit in `limit` bytes (default: a local device's memory), fastest
    first; the last candidate is always included."""
    *others, last = candidates(config, mesh)
    if not others:
        return [last]
    if limit is None:
        limit, _ = hardware.memory()
    # Estimates are inexact, and other programs use a CPU's memory too.
    usable_share = 0.5 if is_cpu(mesh) else 0.9
    fitting = [one for one in others if expected_need(one, mesh).total <= limit * usable_share]
    return [*fitting, last]


def candidates(config: TrainConfig, mesh: Mesh) -> list[TrainConfig]:
    """The settings `auto` chooses from, expected fastest first.

    Recomputing nothing saves a quarter of the work, but does not pay if micro-batches must then be
    too small to keep an accelerator busy. On a CPU, recomputing activations is as fast as loading
    stored ones.
    """
    kinds = [config.remat]
    if config.remat == AUTO:
        kinds = ["blocks"] if is_cpu(mesh) else ["none", "products", "blocks"]
    n_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    numbers = [config.grad_accum]
    if config.grad_accum == AUTO:
        most = min(config.batch_size // n_shards, MOST_MICRO_BATCHES)
        numbers = [n for n in range(1, most + 1) if config.batch_size % (n * n_shards) == 0] or [1]

    found = []
    for kind in kinds:
        for number in numbers:
            n_tokens = config.batch_size // number * config.sequence_length // n_shards
            is_small = n_tokens < FEWEST_TOKENS and number > numbers[0]
            if is_small and kind != kinds[-1]:
                continue
            # A loop over the blocks would copy the stored activations into stacked arrays.
            unroll = config.unroll or (config.remat == AUTO and kind == "none")
            found.append(dataclasses.replace(config, grad_accum=number, remat=kind, unroll=unroll))
    return found


def is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def expected_need(config: TrainConfig, mesh: Mesh) -> Need:
    """A step's estimated need, without compiling it: within about a fifth of XLA's plan."""
    model = config.model
    least = least_need(config, mesh)
    weight_shards = mesh.size // mesh.shape["data"]
    batch_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    n_tokens = config.batch_size // config.grad_accum * config.sequence_length // batch_shards
    item_bytes = flops.ITEM_BYTES[model.compute_dtype or "float32"]

    # What a block stores per token: the inputs of its norms, its projections, and the MLP's
    # hidden layer before, inside and after the activation.
    mixed = model.n_heads * model.head_width
    products = 2 * model.d_model + flops.qkv_width(model) + mixed + flops.mlp_inputs_width(model)
    everything = 2 * model.d_model + products + 2 * model.ff_width
    everything_bytes = everything * item_bytes
    may_be_fused = model.compute_dtype == "bfloat16" and not config.deterministic
    if is_cpu(mesh):
        may_be_fused = config.sequence_length >= blockwise_attention.SHORTEST
    if config.attention == "plain" or model.dropout or not may_be_fused:
        # Unfused attention: float32 scores and weights, and the weights in the compute dtype.
        everything_bytes += model.n_heads * config.sequence_length * (8 + item_bytes)
    of_block = {"none": everything_bytes, "products": products * item_bytes, "blocks": 0}
    kept = n_tokens * model.n_layers * of_block[config.remat]
    if config.remat != "none":
        kept += n_tokens * everything_bytes  # for the block being recomputed

    # The loss: a chunk of logits and their gradient.
    loss = 2 * fused_loss.LOGITS_BYTES
    if is_cpu(mesh):
        n_rows = model.padded_vocab // count_chunks(model.padded_vocab)
        loss = 3 * n_tokens * n_rows * flops.ITEM_BYTES["float32"]

    sums = 0
    if config.grad_accum > 1:
        sums = flops.weight_bytes(model, "float32") // weight_shards
    return Need(least.state, least.temporary + kept + loss + sums)


def optimizer_bytes(config: TrainConfig) -> int:
    """Bytes of the optimizer's moments on all devices together: two per weight, but under Muon only
    one for the blocks' matrices."""
    model = config.model
    n_moments = 2 * (flops.weight_bytes(model) // flops.ITEM_BYTES[model.param_dtype])
    if config.optimizer == "muon":
        n_moments -= model.n_layers * flops.block_matrices(model)
    return n_moments * flops.ITEM_BYTES["float32"]


def require_room(need: Need) -> None:
    """Raise UserError if a step exceeds a device's memory, since a CPU process would be killed."""
    limit, source = hardware.memory()
    require(
        need.total <= limit,
        f"out of memory: a step needs {filesize.decimal(need.total)}, including "
        f"{filesize.decimal(need.state)} for weights and optimizer, but a device has "
        f"{filesize.decimal(limit)} ({source}): {MEMORY_ADVICE}",
    )


@contextlib.contextmanager
def explain_out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turn an out-of-memory error in the body into a UserError that names the flags to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with batches of {config.batch_size:,} sequences of "
            f"{config.sequence_length:,} tokens: {MEMORY_ADVICE}; --dry-run shows what fits"
        ) from None
