"""Meshes of eight virtual devices against one device; run by test_mesh.py in its own process.

    python on_eight_devices.py FOLDER TEXT

Prints one JSON object: what each mesh gave. Leaves a run of mesh (2, 2, 2) in FOLDER.
"""

import json
import sys
from dataclasses import replace
from functools import reduce

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time

import numpy as np  # noqa: E402
from programs import TINY, call  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from gpt.training import step  # noqa: E402

MODEL = ModelConfig(300, context_length=16, n_layers=2, n_heads=4, d_model=32, dropout=0.1)
CONFIG = TrainConfig(model=MODEL, batch_size=16, grad_accum=2, steps=20, warmup_steps=2)
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 4),
          "all": (2, 2, 2)}  # fmt: skip


def tokens(n: int) -> np.ndarray:
    """The batch of step n, [grad_accum, rows, T+1]."""
    ids = np.random.default_rng(n).integers(300, size=(2, 8, 17))
    return ids.astype(np.int32)


def train(sizes: tuple[int, int, int], n_steps: int):
    """The losses of a few steps on a mesh, the state after them, and how to evaluate it."""
    n_devices = reduce(int.__mul__, sizes)
    config = replace(CONFIG, mesh=MeshConfig(*sizes))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:n_devices])
    step.require_fit(config, mesh)
    state, losses = step.make_state(config, mesh), []
    train_step, eval_step = step.compile_steps(config, mesh)
    for n in range(n_steps):
        batch = jax.device_put(tokens(n), sharding.rows(mesh, axis=1))
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))  # waits: collectives of two steps could deadlock
    return losses, state, eval_step


def layout(tree) -> dict[str, dict]:
    """The partition of each leaf, its bytes, and the most bytes of it on any one device."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        most = max(shard.data.nbytes for shard in leaf.addressable_shards)
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = {
            "spec": [list(a) if isinstance(a, tuple) else a for a in leaf.sharding.spec],
            "bytes": leaf.nbytes,
            "most": most,
        }
    return found


def report(name: str) -> dict:
    """What a mesh gave."""
    losses, state, eval_step = train(MESHES[name], 5)
    found = {"losses": losses, "params": layout(state.params)}
    found |= {"optimizer": layout(state.optimizer)}
    if name in ("one", "all"):
        total, _ = eval_step(state.params, tokens(99)[0], np.ones((8, 16), np.float32))
        found["evaluation"] = float(total)
    return found


def main() -> None:
    """All meshes, then a whole run of train.py on the mixed one."""
    folder, text = sys.argv[1:]
    meshes = {name: report(name) for name in MESHES}
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    argv = [*TINY, "--batch-size", "8", *mesh, "--data", text, "--out", folder]
    refused = call("train", *argv, "--grad-accum", "8")
    ran = call("train", *argv)
    print(json.dumps({"meshes": meshes, "refused": vars(refused), "ran": vars(ran)}))


if __name__ == "__main__":
    main()
