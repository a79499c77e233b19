"""Meshes of eight virtual devices against one device; run by test_mesh.py in its own process.

    python on_eight_devices.py meshes NAME...       a few steps on each of these meshes
    python on_eight_devices.py run FOLDER TEXT FLAG...   train.py on mesh (2, 2, 2), into FOLDER

Prints one JSON object: what each mesh gave, or how the run ended.
"""

import json
import sys
from dataclasses import replace
from functools import partial, reduce

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
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 4),
          "all": (2, 2, 2), "rows and heads": (4, 1, 2)}  # fmt: skip
STEPS = 20


def tokens(n: int) -> np.ndarray:
    """The batch of step n, [grad_accum, rows, T+1]."""
    ids = np.random.default_rng(n).integers(300, size=(2, 8, 17))
    return ids.astype(np.int32)


def train(config: TrainConfig, sizes: tuple[int, int, int]):
    """The losses of a few steps on a mesh, the state after them, how to evaluate it, and what is
    said of the mesh."""
    n_devices = reduce(int.__mul__, sizes)
    config = replace(config, mesh=MeshConfig(*sizes))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:n_devices])
    notes = train_step.require_fit(config, mesh)
    state, losses = train_state.make_state(config, mesh), []
    step, eval_step = train_step.compile_steps(config, mesh)
    for n in range(STEPS):
        batch = jax.device_put(tokens(n), sharding.rows(mesh, axis=1))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))  # waits: collectives of two steps could deadlock
    return losses, state, eval_step, notes


def train_by_pmap() -> list[float]:
    """The losses of data parallelism as it was once written: the oracle of the mesh's `data`.

    Every device keeps all weights, takes its rows of the batch, and averages gradients with the
    others (Dean et al. 2012, synchronous).
    """
    optimizer = make_optimizer(CONFIG)
    params = train_state.make_state(
        CONFIG, sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
    ).params

    @partial(jax.pmap, axis_name="devices")
    def update(params, moments, tokens_BU, key_B):
        aim = jax.value_and_grad(partial(objective, CONFIG), has_aux=True)
        (_, loss), grads = aim(params, tokens_BU, key_B)
        loss, grads = jax.lax.pmean((loss, grads), "devices")
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def copied(tree):
        return jax.tree.map(lambda a: jnp.broadcast_to(np.asarray(a), (8, *a.shape)), tree)

    params, moments, losses = copied(params), copied(optimizer.init(params)), []
    for n in range(STEPS):
        keys_AB = train_step.dropout_keys(CONFIG, jnp.int32(n), 2, 8)
        params, moments, loss = update(params, moments, tokens(n).swapaxes(0, 1), keys_AB.T)
        losses.append(float(loss[0]))
    return losses


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
    """What a mesh gave; the last two names stand for other ways to train."""
    if name == "pmap":
        return {"losses": train_by_pmap()}
    few = name.startswith("few heads")
    sizes = MESHES[name.removeprefix("few heads, ")]
    losses, state, eval_step, notes = train(FEW_HEADS if few else CONFIG, sizes)
    total, _ = eval_step(state.params, tokens(99)[0], np.ones((8, 16), np.float32))
    arrays = {"params": layout(state.params), "opt_state": layout(state.opt_state)}
    found = {"losses": losses, "notes": notes, "evaluation": float(total)}
    return found | arrays | {"mesh": dict(zip(sharding.AXES, sizes, strict=True))}


def main() -> None:
    what, *words = sys.argv[1:]
    keep_compiled()
    if what == "meshes":
        print(json.dumps({name: report(name) for name in words}))
        return
    folder, text, *flags = words
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    argv = [*TINY, "--batch-size", "8", *mesh, "--data", text, "--out", folder]
    print(json.dumps(vars(call("train", *argv, *flags))))


if __name__ == "__main__":
    main()
