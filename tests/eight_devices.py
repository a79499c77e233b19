"""Training and sampling on eight virtual devices; run by test_mesh.py in a process of its own.

    python eight_devices.py TASK...     each as JSON: the name of a function below, its arguments

Prints one JSON list: what each task gave.
"""

import json
import math
import sys
from dataclasses import replace

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time

import numpy as np  # noqa: E402
from byte_models import LETTERS, weights  # noqa: E402
from programs import TINY, call, keep_compiled  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.compile_log import compilations  # noqa: E402
from gpt.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from gpt.evaluate.likelihood import loglikelihoods  # noqa: E402
from gpt.model import transformer  # noqa: E402
from gpt.sampling import beam_search, cache_check, generate  # noqa: E402
from gpt.sampling.language_model import LanguageModel  # noqa: E402
from gpt.sampling.settings import Settings  # noqa: E402
from gpt.training import step_functions, train_state  # noqa: E402

MESHES = {
    "one": (1, 1, 1),
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 4),
    "all": (2, 2, 2),
    "rows and heads": (4, 1, 2),
    "rows and width": (2, 4, 1),
    "more devices than heads": (1, 1, 8),
}
MODEL = ModelConfig(300, context_length=16, n_layers=2, n_heads=4, d_model=32, dropout=0.1)
CONFIG = TrainConfig(model=MODEL, batch_size=16, grad_accum=2, steps=20, warmup_steps=2)
SAMPLED = ModelConfig(257, context_length=64, n_layers=2, n_heads=8, n_kv_heads=4, d_model=32)
PROMPTS = ["a", "some text", "b" * 40, "今天", "x", "y", "z", "0"]
GREEDY = Settings(max_new_tokens=40, temperature=0, ignore_eos=True)
MIXED = [replace(GREEDY, temperature=0.8, top_p=0.9, seed=i) for i in range(len(PROMPTS))]


def make_mesh(name: str) -> jax.sharding.Mesh:
    sizes = MESHES[name]
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


def layout(tree) -> dict[str, dict]:
    """Of each array its partition, its bytes, and the most bytes of it on any one device."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = {
            "spec": [list(a) if isinstance(a, tuple) else a for a in leaf.sharding.spec],
            "bytes": leaf.nbytes,
            "most": max(shard.data.nbytes for shard in leaf.addressable_shards),
        }
    return found


# Training.


def run(folder: str, text: str, *flags: str) -> dict:
    """How train.py ended on a mesh that splits rows, weights and heads, into `folder`."""
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    argv = [*TINY, "--batch-size", "8", *mesh, "--data", text, "--out", folder]
    return vars(call("train", *argv, *flags))


def tokens(n: int) -> np.ndarray:
    """The batch of step n, [grad_accum, rows, T+1]."""
    ids = np.random.default_rng(n).integers(300, size=(2, 8, 17))
    return ids.astype(np.int32)


def train(name: str, n_kv_heads: int | None = None) -> dict:
    """What twenty steps on a mesh gave: losses, an evaluation, how the state is laid out."""
    mesh = make_mesh(name)
    model = replace(MODEL, n_kv_heads=n_kv_heads)
    config = replace(CONFIG, model=model, mesh=MeshConfig(*MESHES[name]))
    notes = step_functions.require_even_split(config, mesh)
    step, eval_step = step_functions.compile_steps(config, mesh)
    state = train_state.make_state(config, mesh)
    losses = []
    for n in range(20):
        batch = jax.device_put(tokens(n), sharding.rows(mesh, axis=1))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))  # waits: collectives of two steps could deadlock
    total, _ = eval_step(state.params, tokens(99)[0], np.ones((8, 16), np.float32))
    return {
        "mesh": dict(mesh.shape),
        "notes": notes,
        "losses": losses,
        "evaluation": float(total),
        "arrays": layout((state.params, state.opt_state)),
    }


# Sampling, searching and scoring.


def place(name: str):
    """The model on a mesh, and what is told of it."""
    mesh = make_mesh(name)
    notes = transformer.require_even_split(SAMPLED, mesh, fsdp=False)
    params, axes = weights(SAMPLED, 0, 6.0), transformer.logical_axes(SAMPLED, stacked=False)
    shardings = sharding.state_shardings(mesh, axes, params, sharding.DECODING_RULES)
    params = jax.device_put(params, shardings)
    return LanguageModel(SAMPLED, params, LETTERS, step=0, mesh=mesh), notes


def sample(name: str, checked: bool = False) -> dict:
    """What a mesh gave, how its weights lie, and how the cache does after the last steps."""
    model, notes = place(name)
    greedy = [c.token_ids for c in generate.complete(model, PROMPTS, GREEDY)]
    drawn = [c.token_ids for c in generate.complete(model, PROMPTS, MIXED)]
    # Twice, so that the end of a hint is foreseen too, and with it proposals pay at once.
    hints = [[*prompt.encode(), *ids] * 2 for prompt, ids in zip(PROMPTS, drawn, strict=True)]
    foreseen = [replace(one, speculate=3) for one in MIXED]
    speculated = generate.complete(model, PROMPTS, foreseen, hints=hints)
    before, kept, honest = compilations.programs, [], generate.decode_chunk

    def watching(*args):
        out = honest(*args)
        kept.append(layout((out[0].cache.k, out[0].cache.v)))
        return out

    generate.decode_chunk = watching
    again = [c.token_ids for c in generate.complete(model, PROMPTS[::-1], GREEDY)][::-1]
    generate.decode_chunk = honest
    found = {"greedy": greedy, "drawn": drawn, "notes": notes, "again": again == greedy}
    found |= {"compiled": compilations.programs - before, "cache": kept[-1]}
    found["speculated"] = [c.token_ids for c in speculated]
    found["accepted"] = sum(c.accepted for c in speculated)
    found["alone"] = generate.complete(model, ["some text"], GREEDY)[0].token_ids
    settings = beam_search.BeamSettings(width=3, max_new_tokens=8)
    found["beam"] = [h[0].token_ids for h in beam_search.search(model, PROMPTS[:2], settings)]
    found["score"] = model.score("some text, longer than the context" * 4).logprobs
    shared = list(b"some text")
    answers = [(shared, [1]), (shared, [2, 3]), ([4], [5])]
    found["answers"] = {}
    for batch in loglikelihoods(model, answers, batch_size=4):
        found["answers"] |= {number: one.logprob for number, one in batch.items()}
    found["weights"] = layout(model.params)
    if checked:
        with jax.default_matmul_precision("highest"), sharding.on_mesh(model.mesh):
            found["check"] = str(cache_check.check_cached(cache_check.Probe(model)))
    return found


TASKS = {task.__name__: task for task in (run, train, sample)}

if __name__ == "__main__":
    keep_compiled()
    tasks = map(json.loads, sys.argv[1:])
    print(json.dumps([TASKS[name](*arguments) for name, *arguments in tasks]))
