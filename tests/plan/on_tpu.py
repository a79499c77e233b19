"""gpt2 compiled for TPUs that are not here; run by test_topology.py in a process of its own.

    python on_tpu.py DATA FSDP TENSOR

Prints one JSON object: the figures of training step, prefill and decode on 16 chips.
"""

import json
import os
import sys
from pathlib import Path

from gpt import cli

cli.prepare_absent()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # the partitioner's warnings too
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from dataclasses import replace  # noqa: E402

import predicted_bytes  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.config import MeshConfig  # noqa: E402
from gpt.plan import absent, collectives, devices, programs  # noqa: E402
from gpt.presets import preset  # noqa: E402
from gpt.training import train_step  # noqa: E402


def figures(compiled, mesh, predicted: dict) -> dict:
    """One program as JSON values."""
    sent = collectives.find(compiled.as_text(), mesh.shape)
    given = compiled.memory_analysis().argument_size_in_bytes
    return {
        "found": [[c.kind, list(c.axes), c.n_bytes, c.n_runs] for c in sent],
        "predicted": [[what, list(axes), n] for (what, axes), n in predicted.items()],
        "given": given,
    }


def main() -> None:
    """Four blocks are enough: training scans over them, and sampling repeats them."""
    found, _ = devices.topology_devices("v5e:4x4")
    config = preset("gpt2")
    config = replace(config, batch_size=64, grad_accum=1, model=replace(config.model, n_layers=4))
    config = absent.completed(config, "bfloat16")
    mesh = sharding.make_mesh(MeshConfig(*map(int, sys.argv[1:])), found)
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
    print(json.dumps(result))


if __name__ == "__main__":
    main()
