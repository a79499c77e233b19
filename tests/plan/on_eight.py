"""Plans for meshes of eight virtual devices, beside the arrays themselves; run by test_plan.py in
its own process. Prints one JSON object; what the partitioner complains of goes to standard error.
"""

import json
import os
from dataclasses import replace

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # the partitioner's warnings too

import jax

jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time

from gpt import sharding  # noqa: E402
from gpt.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from gpt.plan import absent, chips, programs  # noqa: E402
from gpt.training import train_state  # noqa: E402

# An untied head: whether a tied one is gathered apart from the lookup's table varies with XLA.
MODEL = ModelConfig(1000, context_length=128, n_layers=2, n_heads=4, d_model=64, tied=False)
CONFIG = TrainConfig(model=MODEL.computing_in("float32"), batch_size=64, grad_accum=2)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2), (4, 1, 2)]


def figures(program: absent.Program) -> dict:
    """One program as JSON values."""
    rows = {"/".join([what, *axes]): n for (what, axes), n in program.moved().items()}
    expected = {"/".join([what, *axes]): n for (what, axes), n in program.predicted.items()}
    return {"moved": rows, "predicted": expected, "given": program.given}


def most(tree) -> int:
    """Bytes of arrays on the device that keeps most of them."""
    kept: dict = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            kept[shard.device] = kept.get(shard.device, 0) + shard.data.nbytes
    return max(kept.values())


def report(sizes: tuple[int, int, int], devices: list) -> dict:
    """What is planned for a mesh, and what its arrays are."""
    n_devices = sizes[0] * sizes[1] * sizes[2]
    config = replace(CONFIG, mesh=MeshConfig(*sizes))
    mesh = sharding.make_mesh(config.mesh, devices[:n_devices])
    state = train_state.make_state(config, mesh)
    weights = programs.abstract_weights(config.model, mesh)
    cache = programs.abstract_cache(config.model, mesh, programs.count_rows(mesh), 128)
    return {
        "planned": absent.state_bytes(config, mesh),
        "arrays": {"weights": most(state.params), "optimizer": most(state.opt_state)},
        "sampling": programs.bytes_on_device((weights, cache)),
        "train": figures(absent.train_program(config, mesh, tpu=False)),
        "prefill": figures(absent.prefill_program(config, mesh)),
        "decode": figures(absent.decode_program(config, mesh)),
    }


def report_kept(devices: list) -> dict:
    """A training step over fsdp that computes nothing again."""
    config = replace(CONFIG, mesh=MeshConfig(1, 8, 1), remat=False)
    mesh = sharding.make_mesh(config.mesh, devices)
    return {"train": figures(absent.train_program(config, mesh, tpu=False))}


if __name__ == "__main__":
    eight = chips.virtual_devices(8)
    found = {"-".join(map(str, sizes)): report(sizes, eight) for sizes in MESHES}
    print(json.dumps(found | {"kept": report_kept(eight)}))
