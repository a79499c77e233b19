"""gpt2 compiled for TPUs that are not here; run by test_topology.py in a process of its own.

    python on_tpu.py collectives DATA FSDP TENSOR      four blocks on 16 chips
    python on_tpu.py attention DATA FSDP TENSOR        two blocks, with fused attention and without

Prints one JSON object.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from gpt import cli

cli.prepare_absent()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # the partitioner's warnings too
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import jax  # noqa: E402
import predicted_bytes  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.config import MeshConfig, TrainConfig  # noqa: E402
from gpt.model import flash_attention  # noqa: E402
from gpt.plan import absent, collectives, devices, programs  # noqa: E402
from gpt.presets import preset  # noqa: E402
from gpt.training import memory_plan, train_step  # noqa: E402


def gpt2(n_layers: int, batch_size: int) -> TrainConfig:
    """Training scans over the blocks, and sampling repeats them: a few are enough."""
    config = preset("gpt2")
    model = replace(config.model, n_layers=n_layers)
    config = replace(config, batch_size=batch_size, grad_accum=1, model=model)
    return absent.completed(config, "bfloat16")


def figures(compiled: jax.stages.Compiled, mesh, predicted: dict) -> dict:
    """One program as JSON values."""
    sent = collectives.find(compiled.as_text(), mesh.shape)
    return {
        "found": [[c.kind, list(c.axes), c.n_bytes, c.n_runs] for c in sent],
        "predicted": [[what, list(axes), n] for (what, axes), n in predicted.items()],
        "given": compiled.memory_analysis().argument_size_in_bytes,
    }


def traffic(sizes: MeshConfig) -> dict:
    """What training step, prefill and decode send on 16 chips."""
    config = gpt2(n_layers=4, batch_size=64)
    mesh = sharding.make_mesh(sizes, devices.topology_devices("v5e:4x4")[0])
    c, n_rows = config.model, programs.count_rows(mesh)
    by_step = predicted_bytes.training(config, mesh, tpu=True)
    result = {
        "state": absent.state_bytes(config, mesh),
        "cache": programs.bytes_on_device(programs.abstract_cache(c, mesh)),
        "train": figures(train_step.compile_train_step(config, mesh), mesh, by_step),
    }
    if mesh.shape["tensor"] > 1:  # else nothing moves
        by_prefill = predicted_bytes.decoding(c, mesh, n_rows, programs.prompt_length(c))
        by_decode = predicted_bytes.decoding(c, mesh, n_rows, 1)
        result["prefill"] = figures(programs.compile_prefill(c, mesh), mesh, by_prefill)
        result["decode"] = figures(programs.compile_decode(c, mesh), mesh, by_decode)
    return result


def attention(sizes: MeshConfig) -> dict:
    """Kernels called and temporary bytes of training step and prefill, fused and plain.

    With a vocabulary of 1,024: with the whole one the logits would be most of the memory.
    """
    config = gpt2(n_layers=2, batch_size=16)
    config = replace(config, model=replace(config.model, vocab_size=1024))
    found, _ = devices.topology_devices("v5e:2x4")
    mesh = sharding.make_mesh(sizes, found[: sizes.data * sizes.fsdp * sizes.tensor])
    result = {}
    for name in ("fused", "plain"):
        compiled = [
            train_step.compile_train_step(config, mesh),
            programs.compile_prefill(config.model, mesh),
        ]
        result[name] = {
            "kernels": [one.as_text().count('target="tpu_custom_call"') for one in compiled],
            "temporary": [memory_plan.need_of(one).temporary for one in compiled],
        }
        flash_attention.KERNELS.clear()
        jax.clear_caches()
    return result


if __name__ == "__main__":
    measure = {"collectives": traffic, "attention": attention}[sys.argv[1]]
    print(json.dumps(measure(MeshConfig(*map(int, sys.argv[2:])))))
