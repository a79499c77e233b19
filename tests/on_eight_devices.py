"""Training on eight virtual devices; run by test_mesh.py in a process of its own.

    python on_eight_devices.py meshes NAME...   some steps on each of these meshes, or by "pmap"
    python on_eight_devices.py run FOLDER TEXT FLAG...   train.py on mesh (2, 2, 2), into FOLDER

Prints one JSON object: what each mesh gave, or how the run ended.
"""

import json
import math
import sys
from dataclasses import replace
from functools import partial

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from programs import TINY, call, keep_compiled  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from gpt.training import train_state, train_step  # noqa: E402
from gpt.training.loss import objective  # noqa: E402
from gpt.training.optimizer import make_optimizer  # noqa: E402

MODEL = ModelConfig(300, context_length=16, n_layers=2, n_heads=4, d_model=32, dropout=0.1)
CONFIG = TrainConfig(model=MODEL, batch_size=16, grad_accum=2, steps=20, warmup_steps=2)
FEW_HEADS = replace(CONFIG, model=replace(MODEL, n_kv_heads=2))
MESHES = {
    "one": (1, 1, 1),
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 4),
    "all": (2, 2, 2),
    "rows and heads": (4, 1, 2),
}


def tokens(n: int) -> np.ndarray:
    """The batch of step n, [grad_accum, rows, T+1]."""
    ids = np.random.default_rng(n).integers(300, size=(2, 8, 17))
    return ids.astype(np.int32)


def layout(tree) -> dict[str, dict]:
    """Of each array its partition, its bytes, and the most bytes of it on any one device."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[jax.tree_util.keystr(path)] = {
            "spec": [list(a) if isinstance(a, tuple) else a for a in leaf.sharding.spec],
            "bytes": leaf.nbytes,
            "most": max(shard.data.nbytes for shard in leaf.addressable_shards),
        }
    return found


def train(name: str) -> dict:
    """What twenty steps on a mesh gave: losses, an evaluation, how the state is laid out."""
    sizes = MESHES[name.removeprefix("few heads, ")]
    config = FEW_HEADS if name.startswith("few heads") else CONFIG
    config = replace(config, mesh=MeshConfig(*sizes))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: math.prod(sizes)])
    notes = train_step.require_fit(config, mesh)
    step, eval_step = train_step.compile_steps(config, mesh)
    state = train_state.make_state(config, mesh)
    losses = []
    for n in range(20):
        batch = jax.device_put(tokens(n), sharding.rows(mesh, axis=1))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))  # waits: collectives of two steps could deadlock
    total, _ = eval_step(state.params, tokens(99)[0], np.ones((8, 16), np.float32))
    return {
        "mesh": dict(zip(sharding.AXES, sizes, strict=True)),
        "notes": notes,
        "losses": losses,
        "evaluation": float(total),
        "arrays": layout((state.params, state.opt_state)),
    }


def train_by_pmap() -> dict:
    """The same losses by data parallelism as it was once written: the oracle of the axis `data`.

    Every device keeps all weights, takes its rows of the batch, and averages gradients with the
    others (Dean et al. 2012, synchronous).
    """
    optimizer, params = make_optimizer(CONFIG), train_state.fresh_state(CONFIG).params

    @partial(jax.pmap, axis_name="devices")
    def update(params, moments, tokens_BU, key_B):
        gradient = jax.value_and_grad(partial(objective, CONFIG), has_aux=True)
        (_, loss), grads = gradient(params, tokens_BU, key_B)
        loss, grads = jax.lax.pmean((loss, grads), "devices")
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def copied(tree):
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (8, *a.shape)), tree)

    params, moments = copied(params), copied(optimizer.init(params))
    losses = []
    for n in range(20):
        keys_AB = train_step.dropout_keys(CONFIG, jnp.int32(n), 2, 8)
        params, moments, loss = update(params, moments, tokens(n).swapaxes(0, 1), keys_AB.T)
        losses.append(float(loss[0]))
    return {"losses": losses}


def main() -> None:
    what, *words = sys.argv[1:]
    keep_compiled()
    if what == "meshes":
        found = {name: train_by_pmap() if name == "pmap" else train(name) for name in words}
        print(json.dumps(found))
        return
    folder, text, *flags = words
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    argv = [*TINY, "--batch-size", "8", *mesh, "--data", text, "--out", folder]
    print(json.dumps(vars(call("train", *argv, *flags))))


if __name__ == "__main__":
    main()
