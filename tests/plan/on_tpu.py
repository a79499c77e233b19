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
from gpt.plan import absent, devices, programs  # noqa: E402
from gpt.presets import preset  # noqa: E402


def figures(program: programs.Program, predicted: dict) -> dict:
    """One program as JSON values."""
    found = [[c.kind, list(c.axes), c.n_bytes, c.n_runs] for c in program.collectives]
    expected = [[what, list(axes), n] for (what, axes), n in predicted.items()]
    return {"found": found, "predicted": expected, "given": program.given_bytes}


def main() -> None:
    """Four blocks are enough: training scans over them, and sampling repeats them."""
    found, _ = devices.topology_devices("v5e:4x4")
    config = preset("gpt2")
    config = replace(config, batch_size=64, grad_accum=1, model=replace(config.model, n_layers=4))
    config = absent.completed(config, "bfloat16")
    mesh = sharding.make_mesh(MeshConfig(*map(int, sys.argv[1:])), found)
    c, n_rows = config.model, programs.count_rows(mesh)
    cache = programs.abstract_cache(c, mesh, n_rows, c.context_length)
    result = {
        "state": absent.state_bytes(config, mesh),
        "cache": programs.bytes_on_device(cache),
        "train": figures(
            programs.train_program(config, mesh), predicted_bytes.training(config, mesh, tpu=True)
        ),
    }
    if mesh.shape["tensor"] > 1:  # else nothing moves
        length = programs.prompt_length(c)
        result["prefill"] = figures(
            programs.prefill_program(c, mesh), predicted_bytes.decoding(c, mesh, n_rows, length)
        )
        result["decode"] = figures(
            programs.decode_program(c, mesh), predicted_bytes.decoding(c, mesh, n_rows, 1)
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
