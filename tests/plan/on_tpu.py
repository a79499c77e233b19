"""gpt2 compiled for TPUs that are not here; run by test_topology.py in its own process.

    python on_tpu.py DATA FSDP TENSOR

Prints one JSON object: the figures of training step, prefill and decode on 16 chips.
"""

import json
import os
import sys

from gpt import cli

cli.prepare_absent()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # the partitioner's warnings too

from dataclasses import replace  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.config import MeshConfig  # noqa: E402
from gpt.plan import absent, chips, programs  # noqa: E402
from gpt.presets import preset  # noqa: E402


def figures(program: absent.Program) -> dict:
    """One program as JSON values."""
    found = [[c.kind, list(c.axes), c.n_bytes, c.turns] for c in program.found]
    expected = [[what, list(axes), n] for (what, axes), n in program.predicted.items()]
    return {"found": found, "predicted": expected, "given": program.given}


def main() -> None:
    """Four blocks are enough: they are scanned over in training and alike in sampling."""
    devices, _ = chips.topology_devices("v5e:4x4")
    asked = preset("gpt2")
    asked = replace(asked, batch_size=64, grad_accum=1, model=replace(asked.model, n_layers=4))
    mesh = sharding.make_mesh(MeshConfig(*map(int, sys.argv[1:])), devices)
    config = absent.settle(asked, False, 16, "bfloat16")
    rows, slots = programs.count_rows(mesh), config.model.context_length
    cache = programs.abstract_cache(config.model, mesh, rows, slots)
    found = {
        "state": absent.state_bytes(config, mesh),
        "cache": programs.bytes_on_device(cache),
        "train": figures(absent.train_program(config, mesh, tpu=True)),
    }
    if mesh.shape["tensor"] > 1:  # else nothing moves
        found["prefill"] = figures(absent.prefill_program(config, mesh))
        found["decode"] = figures(absent.decode_program(config, mesh))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
