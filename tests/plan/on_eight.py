"""Plans for meshes of eight virtual devices beside the real arrays; run by test_plan.py in a
process of its own.

    python on_eight.py MESH ...      as 2-2-2, or kept: a step over fsdp without recomputation

Prints one JSON object. The partitioner's complaints go to standard error.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # the partitioner's warnings too
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import jax

jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time

import predicted_bytes  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from gpt.plan import absent, devices, programs  # noqa: E402
from gpt.training import train_state  # noqa: E402

# An untied head: whether a tied one is gathered apart from the lookup's table varies with XLA.
MODEL = ModelConfig(1000, context_length=128, n_layers=2, n_heads=4, d_model=64, tied=False)
CONFIG = TrainConfig(model=MODEL.computing_in("float32"), batch_size=64, grad_accum=2)


def figures(program: programs.Program, predicted: dict) -> dict:
    """One program as JSON values."""
    moved = predicted_bytes.moved(program.collectives)
    return {
        "moved": {"/".join([what, *axes]): n for (what, axes), n in moved.items()},
        "predicted": {"/".join([what, *axes]): n for (what, axes), n in predicted.items()},
        "given": program.given_bytes,
    }


def most(tree) -> int:
    """Bytes of arrays on the device that holds most of them."""
    held: dict = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def train_figures(config: TrainConfig, mesh) -> dict:
    predicted = predicted_bytes.training(config, mesh, tpu=False)
    return figures(programs.train_program(config, mesh), predicted)


def report(name: str, found: list) -> dict:
    """What is planned for a mesh, and what its arrays are."""
    if name == "kept":
        config = replace(CONFIG, mesh=MeshConfig(1, 8, 1), remat=False, unroll=True)
        return {"train": train_figures(config, sharding.make_mesh(config.mesh, found))}

    data, fsdp, tensor = map(int, name.split("-"))
    config = replace(CONFIG, mesh=MeshConfig(data, fsdp, tensor))
    mesh = sharding.make_mesh(config.mesh, found[: data * fsdp * tensor])
    state = train_state.make_state(config, mesh)
    c, n_rows = config.model, programs.count_rows(mesh)
    weights = programs.abstract_weights(c, mesh)
    cache = programs.abstract_cache(c, mesh, n_rows, 128)
    by_prefill = predicted_bytes.decoding(c, mesh, n_rows, programs.prompt_length(c))
    by_decode = predicted_bytes.decoding(c, mesh, n_rows, 1)
    return {
        "planned": absent.state_bytes(config, mesh),
        "arrays": {"weights": most(state.params), "optimizer": most(state.opt_state)},
        "sampling": programs.bytes_on_device((weights, cache)),
        "train": train_figures(config, mesh),
        "prefill": figures(programs.prefill_program(c, mesh), by_prefill),
        "decode": figures(programs.decode_program(c, mesh), by_decode),
    }


if __name__ == "__main__":
    eight = devices.virtual_devices(8)
    print(json.dumps({name: report(name, eight) for name in sys.argv[1:]}))
