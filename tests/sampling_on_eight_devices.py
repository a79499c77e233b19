"""Sampling, scoring and searching on meshes of eight virtual devices against one; run by
test_mesh_sampling.py in its own process.

    python sampling_on_eight_devices.py NAME...

Prints one JSON object: what each of these meshes gave."""

import json
import sys
from dataclasses import replace
from functools import reduce

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time

from byte_models import LETTERS, weights  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.compile_log import compilations  # noqa: E402
from gpt.config import MeshConfig, ModelConfig  # noqa: E402
from gpt.model import transformer  # noqa: E402
from gpt.sampling import beam_search, cache_check, generate  # noqa: E402
from gpt.sampling.language_model import LanguageModel  # noqa: E402
from gpt.sampling.settings import Settings  # noqa: E402

CONFIG = ModelConfig(257, context_length=64, n_layers=2, n_heads=8, n_kv_heads=4, d_model=32)
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 2, 1), "tensor": (1, 1, 4),
          "both": (4, 1, 2), "more than heads": (1, 1, 8)}  # fmt: skip
PROMPTS = ["a", "some text", "b" * 40, "今天", "x", "y", "z", "0"]
GREEDY = Settings(max_new_tokens=40, temperature=0, ignore_eos=True)
MIXED = [replace(GREEDY, temperature=0.8, top_p=0.9, seed=i) for i in range(len(PROMPTS))]


def spread(tree) -> list:
    """The partition of each array, and whether its devices hold what that implies."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        most = max(shard.data.nbytes for shard in leaf.addressable_shards)
        found.append((name, list(leaf.sharding.spec), leaf.nbytes, most))
    return found


def place(config: ModelConfig, sizes: tuple[int, int, int]):
    """The model on a mesh."""
    n_devices = reduce(int.__mul__, sizes)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:n_devices])
    notes = transformer.require_fit(config, mesh, fsdp=False)
    params, axes = weights(config, 0, 6.0), transformer.logical_axes(config, stacked=False)
    shardings = sharding.state_shardings(mesh, axes, params, sharding.DECODING)
    params = jax.device_put(params, shardings)
    return LanguageModel(config, params, LETTERS, step=0, mesh=mesh), notes


def caches(model) -> list:
    """How the cache lies after a few steps."""
    kept, honest = [], generate.decode_chunk

    def watching(*args):
        out = honest(*args)
        kept.append(spread((out[0].cache.k, out[0].cache.v)))
        return out

    generate.decode_chunk = watching
    generate.complete(model, PROMPTS, replace(GREEDY, max_new_tokens=20))
    generate.decode_chunk = honest
    assert len({json.dumps(one) for one in kept}) <= 2  # two capacities
    return kept[-1]


def report(sizes: tuple[int, int, int]) -> dict:
    """What a mesh gave."""
    model, notes = place(CONFIG, sizes)
    greedy = [c.token_ids for c in generate.complete(model, PROMPTS, GREEDY)]
    drawn = [c.token_ids for c in generate.complete(model, PROMPTS, MIXED)]
    before = compilations.programs
    again = [c.token_ids for c in generate.complete(model, PROMPTS[::-1], GREEDY)][::-1]
    found = {"greedy": greedy, "drawn": drawn, "notes": notes, "cache": caches(model)}
    found |= {"compiled": compilations.programs - before, "again": again == greedy}
    found["alone"] = generate.complete(model, ["some text"], GREEDY)[0].token_ids
    settings = beam_search.BeamSettings(width=3, max_new_tokens=8)
    found["beam"] = [h[0].token_ids for h in beam_search.search(model, PROMPTS[:2], settings)]
    found["score"] = model.score("some text, longer than the context" * 4).logprobs
    found["weights"] = spread(model.params)
    with jax.default_matmul_precision("highest"), sharding.on_mesh(model.mesh):
        found["check"] = str(cache_check.check_cached(cache_check.Probe(model)))
    return found


if __name__ == "__main__":
    print(json.dumps({name: report(MESHES[name]) for name in sys.argv[1:]}))
