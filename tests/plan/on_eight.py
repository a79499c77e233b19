"""The plans that train.py prints for eight virtual devices, beside predictions and real arrays; run
by test_plan.py in a process of its own.

    python on_eight.py MESH ...        as 2-2-2 or, without recomputation, 1-8-1-no-remat

Prints one JSON object. The partitioner's complaints go to standard error.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

from gpt import cli

cli.prepare_absent()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # the partitioner's warnings too
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import jax  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time

import predicted_bytes  # noqa: E402

import train  # noqa: E402
from gpt.plan import absent, devices, programs  # noqa: E402
from gpt.training import train_state, train_step  # noqa: E402

# An untied head: whether a tied one is gathered apart from the lookup's table varies with XLA.
MODEL = ["--model.n-layers", "2", "--model.d-model", "64", "--model.n-heads", "4"]
MODEL += ["--model.no-tied", "--tokenizer", "bpe", "--vocab-size", "1000", "--seq-len", "128"]
FLAGS = {"no-remat": ["--no-remat", "--unroll"]}


def most(tree) -> int:
    """Bytes of arrays on the device that holds most of them."""
    held: dict = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def figures(compiled: jax.stages.Compiled, mesh, predicted: dict) -> dict:
    """One program as JSON values."""
    moved = predicted_bytes.moved(compiled, mesh)
    return {
        "moved": {"/".join([what, *axes]): n for (what, axes), n in moved.items()},
        "predicted": {"/".join([what, *axes]): n for (what, axes), n in predicted.items()},
        "given": compiled.memory_analysis().argument_size_in_bytes,
    }


def report(name: str) -> dict:
    """What is planned for a mesh, what is predicted, and what its arrays are."""
    data, fsdp, tensor, *setting = name.split("-", 3)
    n_devices = int(data) * int(fsdp) * int(tensor)
    flags = ["--dry-run", "--devices", str(n_devices), "--batch-size", "64", "--grad-accum", "2"]
    flags += ["--mesh.data", data, "--mesh.fsdp", fsdp, "--mesh.tensor", tensor]

    # The command line, and the programs that it compiles.
    compiled = {}

    def recorded(module, function: str):
        honest = getattr(module, function)

        def compile_program(config, mesh):
            compiled[function] = config, mesh, honest(config, mesh)
            return compiled[function][-1]

        return mock.patch.object(module, function, compile_program)

    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        recorded(train_step, "compile_train_step"),
        recorded(programs, "compile_prefill"),
        recorded(programs, "compile_decode"),
    ):
        assert train.main(["gpt2", *MODEL, *flags, *FLAGS.get("".join(setting), [])]) == 0
    config, mesh, step = compiled["compile_train_step"]
    c, _, prefill = compiled["compile_prefill"]
    _, _, decode = compiled["compile_decode"]

    state = train_state.make_state(config, mesh)
    sampling = programs.abstract_weights(c, mesh), programs.abstract_cache(c, mesh)
    n_rows, length = programs.count_rows(mesh), programs.prompt_length(c)
    return {
        "said": said.getvalue(),
        "planned": absent.state_bytes(config, mesh),
        "arrays": {"weights": most(state.params), "optimizer": most(state.opt_state)},
        "sampling": programs.bytes_on_device(sampling),
        "train": figures(step, mesh, predicted_bytes.training(config, mesh, tpu=False)),
        "prefill": figures(prefill, mesh, predicted_bytes.decoding(c, mesh, n_rows, length)),
        "decode": figures(decode, mesh, predicted_bytes.decoding(c, mesh, n_rows, 1)),
    }


if __name__ == "__main__":
    eight = devices.virtual_devices(8)
    devices.virtual_devices = lambda n: eight[:n]  # once JAX has started, their number is fixed
    print(json.dumps({name: report(name) for name in sys.argv[1:]}))
