"""A plan that train.py makes, beside what is predicted; run in a process of its own, as
JAX fixes its devices when it starts.

    python compiled.py DEVICES MESH [FLAG ...]     8 2-2-2, or v5e:4x4 1-16-1 --no-remat

Prints one JSON object. The partitioner's complaints go to standard error.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

from gpt import cli

cli.prepare_absent()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # the partitioner's warnings too
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import jax  # noqa: E402
import predicted_bytes  # noqa: E402

import train  # noqa: E402
from gpt.plan import absent, programs  # noqa: E402

# An untied head: whether a tied one is gathered apart from the lookup's table varies with XLA.
MODEL = ["--model.n-layers", "2", "--model.d-model", "64", "--model.n-heads", "4"]
MODEL += ["--model.no-tied", "--tokenizer", "bpe", "--vocab-size", "1000"]
MODEL += ["--seq-len", "128", "--batch-size", "64", "--grad-accum", "2"]


def by_row(moved: dict) -> dict:
    return {"/".join([what, *axes]): n for (what, axes), n in moved.items()}


def library_calls(text: str) -> int:
    """Calls of fused attention on GPUs and TPUs."""
    return text.count('target="__cudnn$fmha') + text.count('target="tpu_custom_call"')


def main(devices: str, sizes: str, *flags: str) -> dict:
    """What is printed and written, and what every program moves, as compiled and as predicted."""
    is_virtual = devices.isdigit()
    data, fsdp, tensor = sizes.split("-")
    mesh_flags = ["--mesh.data", data, "--mesh.fsdp", fsdp, "--mesh.tensor", tensor]
    where = ["--devices" if is_virtual else "--topology", devices]

    # The command line, and the programs that it compiles.
    compiled, planned = {}, {}
    describe, completed = absent.describe, absent.completed

    def recording_describe(program, one, mesh, chip):
        compiled[program.name] = one
        planned["mesh"] = mesh
        return describe(program, one, mesh, chip)

    def recording_completed(*args):
        planned["config"] = completed(*args)
        return planned["config"]

    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(said),
        mock.patch.object(absent, "describe", recording_describe),
        mock.patch.object(absent, "completed", recording_completed),
    ):
        file = Path(folder) / "plan.json"
        words = ["gpt2", *MODEL, "--dry-run", *where, *mesh_flags, *flags]
        assert train.main([*words, "--json", str(file)]) == 0
        written = json.loads(file.read_text())

    config, mesh = planned["config"], planned["mesh"]
    c, n_rows = config.model, programs.count_rows(mesh)
    predicted = {
        "training step": predicted_bytes.training(config, mesh, tpu=not is_virtual),
        "prefill": predicted_bytes.decoding(c, mesh, n_rows, programs.prompt_length(c)),
        "decode step": predicted_bytes.decoding(c, mesh, n_rows, 1),
    }
    sampling = programs.abstract_weights(c, mesh), programs.abstract_cache(c, mesh)
    return {
        "said": said.getvalue(),
        "programs": {one["name"]: one for one in written["programs"]},
        "moved": {name: by_row(predicted_bytes.moved(compiled[name], mesh)) for name in predicted},
        "predicted": {name: by_row(rows) for name, rows in predicted.items()},
        "library_calls": {name: library_calls(one.as_text()) for name, one in compiled.items()},
        "state": absent.state_bytes(config, mesh),
        "sampling": programs.bytes_on_device(sampling),
    }


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        jax.config.update("jax_disable_most_optimizations", True)  # compiling takes the time
    print(json.dumps(main(*sys.argv[1:])))
