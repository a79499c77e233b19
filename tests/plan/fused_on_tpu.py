"""Two blocks of gpt2 compiled for TPUs that are not here, with fused attention and without; run by
test_topology.py in a process of its own.

    python fused_on_tpu.py DATA FSDP TENSOR

Prints one JSON object: kernels called and temporary bytes, of the training step and of prefill.
"""

import json
import sys
from dataclasses import replace

from gpt import cli

cli.prepare_absent()

import jax  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.config import MeshConfig  # noqa: E402
from gpt.model import flash_attention  # noqa: E402
from gpt.plan import absent, devices, programs  # noqa: E402
from gpt.presets import preset  # noqa: E402
from gpt.training import memory_plan, train_step  # noqa: E402


def figures(config, mesh) -> dict:
    """Of training step and prefill: kernels called and temporary bytes."""
    compiled = [
        train_step.compile_train_step(config, mesh),
        programs.compile_prefill(config.model, mesh),
    ]
    return {
        "kernels": [one.as_text().count('target="tpu_custom_call"') for one in compiled],
        "temporary": [memory_plan.need_of(one).temporary for one in compiled],
    }


def main() -> None:
    """A vocabulary of 1,024: with the whole one the logits would be most of the memory."""
    data, fsdp, tensor = map(int, sys.argv[1:])
    found, _ = devices.topology_devices("v5e:2x4")
    mesh = sharding.make_mesh(MeshConfig(data, fsdp, tensor), found[: data * fsdp * tensor])
    config = preset("gpt2")
    config = replace(config, batch_size=16, grad_accum=1, model=replace(config.model, n_layers=2))
    config = absent.completed(config, "bfloat16")
    config = replace(config, model=replace(config.model, vocab_size=1024))
    fused = figures(config, mesh)
    flash_attention.KERNELS.clear()
    jax.clear_caches()
    print(json.dumps({"fused": fused, "plain": figures(config, mesh)}))


if __name__ == "__main__":
    main()
