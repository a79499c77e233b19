"""What the tests of checkpoints save, restore and compare."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt import checkpoint
from gpt.checkpoint import CheckpointManager

METADATA = {"text": "今天", "none": None, "fraction": 0.1, "nested": {"list": [1, 2]}}


class Pair(NamedTuple):
    first: jax.Array
    second: dict


def params(seed: int = 0):
    return {
        "blocks": {
            "q": jax.random.normal(jax.random.key(seed), (4, 8, 16)),
            "scale": jax.random.normal(jax.random.key(seed + 1), (4, 8), jnp.bfloat16),
        },
        "dotted.name": jnp.arange(5, dtype=jnp.int32) + seed,
        "mask": jnp.array([1, 0, 1], jnp.int8),
        "scalar": jnp.float32(3 + seed),
        "bits": jnp.array([0, 2**32 - 1], jnp.uint32),
        "odd": jnp.array([jnp.nan, -jnp.inf, -0.0]),
    }


def state(seed: int = 0):
    """Trees as a training run has them: nested dicts, an optimizer's NamedTuples, a tuple."""
    weights = params(seed)
    moments = optax.adamw(1e-3).init(weights)
    return {"params": weights, "opt": (moments, Pair(jnp.int32(seed), {"ema": weights["odd"]}))}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def save(folder, *steps, keep=10):
    with CheckpointManager(folder, keep) as writer:
        for step in steps:
            writer.save(step, state(step), METADATA | {"step": step})


def restore_all(folder, step):
    trees = abstract(state())
    metadata = checkpoint.read_metadata(folder, step)
    restored = {name: checkpoint.restore(folder, step, name, trees[name]) for name in trees}
    return metadata, restored


def files_of(folder, step):
    return sorted(p for p in checkpoint.step_dir(folder, step).rglob("*") if p.is_file())


def newest_metadata(folder):
    return checkpoint.latest_good(folder, lambda step: checkpoint.read_metadata(folder, step))
