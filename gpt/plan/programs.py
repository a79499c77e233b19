"""The programs of a run and of sampling, compiled for a mesh from shapes alone.

Shape letters: see gpt/model/transformer.py.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gpt import flops, sharding
from gpt.config import ModelConfig, TrainConfig
from gpt.model import kv_cache, transformer
from gpt.plan import collectives
from gpt.plan.devices import Chip
from gpt.sampling import engine
from gpt.training import memory_plan, train_step

ROWS = 8  # sampled together on each part of the batch axes


@dataclass(frozen=True)
class Program:
    """What one compiled program takes of one device."""

    name: str
    compile_seconds: float
    given_bytes: int
    """Arguments: weights, optimizer state, cache, tokens."""
    need: memory_plan.Need
    flops: float
    """By gpt/flops.py."""
    collectives: list[collectives.Collective]
    read_bytes: int = 0
    """What it must at least read from memory, where that and not the FLOPs limits it."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave the device."""
        return sum(one.sent_bytes for one in self.collectives)

    def work_seconds(self, chip: Chip) -> float:
        """Time of the arithmetic at the chip's peak, or of its reads if they take longer."""
        return max(
            self.flops / chip.flops_per_second, self.read_bytes / chip.memory_bytes_per_second
        )

    def link_seconds(self, chip: Chip) -> float:
        """Time in which all that is sent passes through one ring."""
        return self.sent_bytes / chip.ring_bytes_per_second

    def efficiency(self, chip: Chip) -> tuple[float, float]:
        """Share of the time spent working: without any overlap of work and communication, and with
        as much as possible."""
        work, links = self.work_seconds(chip), self.link_seconds(chip)
        return work / (work + links), work / max(work, links)


def train_program(config: TrainConfig, mesh: Mesh) -> Program:
    """The training step."""
    n_tokens = config.batch_size * config.window
    n_flops = n_tokens * flops.train_flops_per_token(config.model) / mesh.size
    compile_step = lambda: train_step.compile_train_step(config, mesh)  # noqa: E731
    return describe("training step", compile_step, mesh, n_flops)


def prefill_program(config: ModelConfig, mesh: Mesh) -> Program:
    """Prefill of prompts as long as are read at once."""
    n_flops = count_rows(mesh) * flops.forward_flops(
        config, prompt_length(config), n_logit_positions=1
    )
    return describe("prefill", lambda: compile_prefill(config, mesh), mesh, n_flops / mesh.size)


def decode_program(config: ModelConfig, mesh: Mesh) -> Program:
    """One decode step with the cache of a full context."""
    n_rows, slots = count_rows(mesh), config.context_length
    n_flops = n_rows * flops.forward_flops(config, 1, n_before=slots - 1, n_logit_positions=1)
    read = (abstract_weights(config, mesh), abstract_cache(config, mesh, n_rows, slots))
    return describe(
        "decode step",
        lambda: compile_decode(config, mesh),
        mesh,
        n_flops / mesh.size,
        bytes_on_device(read),
    )


def describe(
    name: str,
    compile_program: Callable[[], jax.stages.Compiled],
    mesh: Mesh,
    n_flops: float,
    read_bytes: int = 0,
) -> Program:
    """Compile a program and look at what came out."""
    begun = time.perf_counter()
    compiled = compile_program()
    seconds = time.perf_counter() - begun
    given_bytes = compiled.memory_analysis().argument_size_in_bytes
    sent = collectives.find(compiled.as_text(), mesh.shape)
    need = memory_plan.need_of(compiled)
    return Program(name, seconds, given_bytes, need, n_flops, sent, read_bytes)


def compile_prefill(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
    """Reading ROWS prompts on each part of the batch axes."""
    n_rows, by_row = count_rows(mesh), sharding.rows(mesh)
    shape = (n_rows, prompt_length(config))
    tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)
    lengths_B = jax.ShapeDtypeStruct((n_rows,), jnp.int32, sharding=by_row)
    with sharding.on_mesh(mesh):
        weights = abstract_weights(config, mesh)
        return engine.prefill.lower(config, weights, tokens_BT, lengths_B).compile()


def compile_decode(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
    """One step of ROWS rows on each part of the batch axes, with a cache of the whole context."""
    n_rows, by_row = count_rows(mesh), sharding.rows(mesh)
    token_B = jax.ShapeDtypeStruct((n_rows,), jnp.int32, sharding=by_row)
    active_B = jax.ShapeDtypeStruct((n_rows,), jnp.bool_, sharding=by_row)
    with sharding.on_mesh(mesh):
        cache = abstract_cache(config, mesh, n_rows, config.context_length)
        weights = abstract_weights(config, mesh)
        return engine.decode_step.lower(config, weights, cache, token_B, active_B).compile()


def count_rows(mesh: Mesh) -> int:
    """Rows that are sampled together on `mesh`."""
    return ROWS * mesh.shape["data"] * mesh.shape["fsdp"]


def prompt_length(config: ModelConfig) -> int:
    """Tokens of a planned prompt: as many as are read at once."""
    return min(engine.PIECE, config.context_length)


def abstract_weights(config: ModelConfig, mesh: Mesh) -> dict:
    """Unstacked weights as sampling keeps them on `mesh`, as shape structs."""
    shapes = jax.eval_shape(transformer.unstack, transformer.abstract(config))
    axes = transformer.logical_axes(config, stacked=False)
    shardings = sharding.state_shardings(mesh, axes, shapes, sharding.DECODING)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )


def abstract_cache(config: ModelConfig, mesh: Mesh, n_rows: int, slots: int) -> kv_cache.KVCache:
    """A cache of `slots` slots per row as sampling keeps it on `mesh`, as shape structs."""

    def place(a):
        names = kv_cache.AXES if a.ndim == len(kv_cache.AXES) else ("batch",)
        split = NamedSharding(mesh, sharding.fitting(mesh, a.shape, names))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split)

    grown = lambda: kv_cache.grow(kv_cache.empty(config, n_rows), slots)  # noqa: E731
    return jax.tree.map(place, jax.eval_shape(grown))


def bytes_on_device(tree) -> int:
    """Bytes of shape structs on the device that holds most of them."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    return total
