"""The planned programs, compiled for a mesh from shapes alone, and the minimum work of each.

Shape letters: gpt/model/transformer.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gpt import flops, sharding
from gpt.config import ModelConfig, TrainConfig
from gpt.model import kv_cache, transformer
from gpt.sampling import decode_loop, engine, generate, sampler
from gpt.sampling.decode_loop import DecodeState
from gpt.sampling.sampler import SamplingParams
from gpt.sampling.settings import Settings
from gpt.training import step_functions

ROWS = 8  # sampled together per shard of the batch axes


@dataclass(frozen=True)
class PlannedProgram:
    """A program, and the FLOPs and, if memory-bound, bytes that one device needs at least."""

    name: str
    compile: Callable[[], jax.stages.Compiled]
    flops: float
    read_bytes: float = 0


def planned(config: TrainConfig, mesh: Mesh) -> list[PlannedProgram]:
    """Training step, prefill, one decode step, and a chunk of the decode loop."""
    c = config.model.for_sampling()
    n_rows = count_rows(mesh)
    n_prompt = prompt_length(c)
    chunk = generate.chunk_size(sharding.platform_of(mesh.devices.flat[0]))
    n_tokens = config.batch_size * config.sequence_length
    train_flops = n_tokens * flops.train_flops_per_token(c) / mesh.size
    prefill_flops = n_rows * flops.forward_flops(c, n_prompt, n_logit_positions=1) / mesh.size
    one_token = flops.forward_flops(c, 1, c.context_length - 1, n_logit_positions=1)
    decode_flops = n_rows * one_token / mesh.size
    decode_bytes = flops.decode_bytes(c, ROWS, c.context_length) / mesh.shape["tensor"]

    weights = abstract_weights(c, mesh)
    state, sampling = abstract_decoding(c, mesh, n_rows)
    tokens_BT = jax.ShapeDtypeStruct((n_rows, n_prompt), jnp.int32)
    count_B = jax.ShapeDtypeStruct((n_rows,), jnp.int32)
    active_B = jax.ShapeDtypeStruct((n_rows,), jnp.bool_)

    def compile_sampling(function, *args, **static) -> jax.stages.Compiled:
        with sharding.on_mesh(mesh):
            placed = jax.tree.map(partial(place_rows, mesh), args)
            return function.lower(c, weights, *placed, **static).compile()

    prefill = partial(compile_sampling, engine.prefill, tokens_BT, count_B)
    decode = partial(compile_sampling, engine.decode_step, state.cache, count_B, active_B)
    loop = partial(
        compile_sampling, decode_loop.decode_chunk, state, sampling, active_B, size=chunk
    )
    return [
        PlannedProgram(
            "training step", partial(step_functions.compile_train_step, config, mesh), train_flops
        ),
        PlannedProgram("prefill", prefill, prefill_flops),
        PlannedProgram("decode step", decode, decode_flops, decode_bytes),
        PlannedProgram("decode loop", loop, chunk * decode_flops, chunk * decode_bytes),
    ]


def abstract_weights(c: ModelConfig, mesh: Mesh) -> dict:
    """Shapes of the unstacked weights, sharded over `mesh` as for sampling."""
    shapes = jax.eval_shape(transformer.unstack, transformer.abstract(c))
    axes = transformer.logical_axes(c, stacked=False)
    shardings = sharding.state_shardings(mesh, axes, shapes, sharding.DECODING_RULES)
    return sharding.with_shardings(shapes, shardings)


def abstract_decoding(
    c: ModelConfig, mesh: Mesh, n_rows: int
) -> tuple[DecodeState, SamplingParams]:
    """Shapes of the decoding state of `n_rows` with a cache for the whole context, and the default
    sampling parameters on `mesh`."""
    count_B = jax.ShapeDtypeStruct((n_rows,), jnp.int32)
    state = DecodeState(
        cache=jax.eval_shape(lambda: kv_cache.grow(kv_cache.empty(c, n_rows), c.context_length)),
        token_B=count_B,
        remaining_B=count_B,
        seen_BV=jax.ShapeDtypeStruct((n_rows, c.vocab_size), jnp.bool_),
        dropped_B=count_B,
        end_ids=jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    no_bias_V = np.zeros(c.vocab_size, np.float32)
    sampling = sampler.sampling_params([Settings()] * n_rows, [no_bias_V] * n_rows)
    if mesh.devices.flat[0].platform != "cpu":
        sampling = sampler.with_known_stages(sampling)  # as on a real accelerator
    return state, sampling


def count_rows(mesh: Mesh) -> int:
    """Rows sampled together on `mesh`."""
    return ROWS * mesh.shape["data"] * mesh.shape["fsdp"]


def prompt_length(config: ModelConfig) -> int:
    """Tokens in a planned prompt: as many as prefill reads at once."""
    return min(engine.PIECE, config.context_length)


def place_rows(mesh: Mesh, a: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of an array of rows, or of part of a cache, sharded over `mesh` as for sampling."""
    names = kv_cache.AXES if a.ndim == len(kv_cache.AXES) else ("batch", None)[: a.ndim]
    split = NamedSharding(mesh, sharding.fitting(mesh, a.shape, names))
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split)
