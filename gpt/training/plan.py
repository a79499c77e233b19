"""The dry run: what a run would take, before anything is built."""

import dataclasses
import math

from jax.sharding import Mesh

from gpt import flops, hardware
from gpt.config import TrainConfig
from gpt.errors import is_out_of_memory, require
from gpt.training import memory_plan, train_step
from gpt.training.memory_plan import size

MIB = 2**20
ABSURD = 2**46  # bytes; far beyond it numbers stop fitting where XLA keeps them


def optimizer_bytes(config: TrainConfig) -> int:
    """Bytes of the optimizer's moments: two of each weight; muon keeps one of a block's matrix."""
    c = config.model
    spared = c.n_layers * flops.block_matrices(c) if config.optimizer == "muon" else 0
    return 2 * flops.weight_bytes(c) - spared * flops.ITEM_BYTES[c.param_dtype]


def describe(config: TrainConfig, n_devices: int, n_tokens: int) -> list[str]:
    """Lines about the model, the bytes it needs in all and what the run computes.

    `n_tokens`: tokens of the training text.
    """
    c, tokens = config.model, config.batch_size * config.window
    weights = flops.weight_bytes(c)
    per_token = flops.train_flops_per_token(c)
    total = tokens * config.steps
    return [
        f"model          {c.n_layers} blocks, width {c.d_model}, {c.n_heads} heads ({c.kv_heads} "
        f"of keys), context {c.context_length}, vocabulary {c.vocab_size:,}",
        f"choices        positions {c.positions}, norm {c.norm} {c.norm_place}, mlp {c.mlp}, "
        f"schedule {config.schedule}",
        f"parameters     {flops.parameters(c):,}",
        f"weights        {weights / MIB:,.1f} MiB in {c.param_dtype}",
        f"gradients      {weights / MIB:,.1f} MiB",
        f"optimizer      {optimizer_bytes(config) / MIB:,.1f} MiB, {config.optimizer}",
        *(
            [f"average        {weights / MIB:,.1f} MiB, evaluated and sampled from"]
            * bool(config.ema_decay)
        ),
        f"computation    {c.compute_dtype}, {per_token / 1e6:,.2f} MFLOP a token to train",
        f"batch          {config.batch_size} x {config.window} = {tokens:,} tokens a step, "
        f"in {config.grad_accum} micro-batch(es), on {n_devices} device(s)",
        f"run            {config.steps:,} steps, {total:,} tokens "
        f"({total / max(n_tokens, 1):,.2f} epochs), {total * per_token:.3g} FLOPs",
    ]


def describe_memory(config: TrainConfig, mesh: Mesh, memory_gb: float | None) -> list[str]:
    """Lines about the memory of one device: what the compiled step takes, and what would fit.

    Compiles the step for a few sizes; no array of the model is made. `memory_gb`: what a device
    has, in 10^9 bytes (default: what is found here).
    """
    least = least_need(config, mesh).total
    require(
        least < ABSURD, f"no device holds {size(least)}, which a step takes: {memory_plan.ADVICE}"
    )
    need, rows = need_of(config, mesh), config.batch_size // config.grad_accum
    stated = None if memory_gb is None else (int(memory_gb * 1e9), "--memory-gb")
    limit, where = stated or hardware.memory()
    gradients = flops.weight_bytes(config.model) // (mesh.size // mesh.shape["data"])

    def total(rows: int) -> float:
        batch_size = rows * config.grad_accum
        return need_of(dataclasses.replace(config, batch_size=batch_size), mesh).total

    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    most = memory_plan.largest_rows(limit, shards, rows, total)
    return [
        f"activations    {size(max(need.temporary - gradients, 0))} beside the gradients, by "
        "XLA's plan for the compiled step",
        f"in all         {size(need.total)} on each device, which has {size(limit)} ({where})",
        f"micro-batch    {rows} sequences; {f'up to {most:,} fit' if most else 'none fits'}"
        + ("" if rows <= most else f": {memory_plan.ADVICE}"),
    ]


def require_room(config: TrainConfig, mesh: Mesh) -> None:
    """UserError if not even the least that a step takes fits: before any array is made."""
    memory_plan.require_room(least_need(config, mesh))


def least_need(config: TrainConfig, mesh: Mesh) -> memory_plan.Need:
    """What a step takes at least of one device: the state, the gradients, and each block's input
    for the device's part of a micro-batch."""
    c, shards = config.model, mesh.size // mesh.shape["data"]
    weights = flops.weight_bytes(c)
    state = weights * (2 if config.ema_decay else 1) + optimizer_bytes(config)
    tokens = config.batch_size // config.grad_accum * config.window
    item = flops.ITEM_BYTES[c.compute_dtype or "float32"]
    inputs = tokens * c.d_model * c.n_layers * item // (mesh.shape["data"] * mesh.shape["fsdp"])
    return memory_plan.Need(state // shards, weights // shards + inputs)


def need_of(config: TrainConfig, mesh: Mesh) -> memory_plan.Need:
    """What the compiled step takes of one device; without end where its compiler says so."""
    try:
        return memory_plan.need_of(train_step.compile_train_step(config, mesh))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return memory_plan.Need(math.inf, math.inf)
