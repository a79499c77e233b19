"""Plans for devices that are not here: what is compiled, and what is predicted.

Those for GPUs and TPUs need the compiler of these, in an environment of its own.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from programs import ROOT, call

from gpt import train_flags
from gpt.errors import UserError
from gpt.plan import absent, devices, programs

sys.path.append(str(ROOT / "benchmarks"))
import predicted_bytes

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA build of JAX"
)
needs_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")

# An untied head: whether a tied one is gathered apart from the lookup's table varies with XLA.
SMALL = [
    *("--model.n-layers", "2", "--model.d-model", "64", "--model.n-heads", "4", "--model.no-tied"),
    *("--tokenizer", "bpe", "--vocab-size", "1000", "--seq-len", "128", "--batch-size", "64"),
]
AXES = ("data", "fsdp", "tensor")


def plan(tmp_path, where: str, sizes: tuple[int, int, int], *flags: str) -> SimpleNamespace:
    """What train.py says and writes, in a process of its own, as JAX fixes its devices when it
    starts; and what each program moves, as compiled and as predicted."""
    mesh = SimpleNamespace(shape=dict(zip(AXES, sizes, strict=True)), manual_axes=())
    file, is_virtual = tmp_path / "plan.json", where.isdigit()
    words = ["gpt2", "--dry-run", "--devices" if is_virtual else "--topology", where, *flags]
    words += ["--json", str(file), "--remat", "blocks"]  # which the predictions are for
    for name, size in mesh.shape.items():
        words += [f"--mesh.{name}", str(size)]

    # Virtual devices are quick to compile for; for others it compiles as for users. The partitioner
    # must not move anything whole for want of a better plan: it would warn.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "0"}
    if is_virtual:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    else:
        environment.pop("JAX_DEFAULT_MATMUL_PRECISION")
        environment["XLA_FLAGS"] = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    command = [sys.executable, ROOT / "train.py", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert "nvoluntary" not in done.stderr and "rematerialization" not in done.stderr

    written = json.loads(file.read_text())
    compiled = {program["name"]: program for program in written["programs"]}
    config = train_flags.parse_args(words, "").config
    config = absent.completed(config, "float32" if is_virtual else "bfloat16")
    c, n_rows = config.model, programs.count_rows(mesh)
    predicted = {
        "training step": predicted_bytes.training(config, mesh, tpu=not is_virtual),
        "prefill": predicted_bytes.decoding(c, mesh, n_rows, programs.prompt_length(c)),
        "decode step": predicted_bytes.decoding(c, mesh, n_rows, 1),
    }
    moved = {name: predicted_bytes.moved(compiled[name], mesh.shape) for name in predicted}
    state = sum(written["state_bytes"].values())
    return SimpleNamespace(
        said=done.stderr, state=state, programs=compiled, moved=moved, predicted=predicted
    )


def check_collectives(found: SimpleNamespace) -> None:
    """Every large collective is a predicted one."""
    assert found.programs["training step"]["given_bytes"] == pytest.approx(found.state, rel=0.1)
    for name in ("training step", "prefill"):
        moved, predicted = found.moved[name], found.predicted[name]
        for row in {*moved, *predicted}:
            difference = abs(moved[row] - predicted[row])
            assert difference <= 0.05 * sum(moved.values()), (name, row)

    # Decoding moves neither weights nor cache: what is predicted, and a few numbers per row.
    moved, predicted = found.moved["decode step"], found.predicted["decode step"]
    assert sum(moved.values()) <= 1.2 * sum(predicted.values()) + 4096


def check_gathers(found: SimpleNamespace, tolerance: float = 0.05) -> None:
    """fsdp gathers what is predicted, however little that is of all that is moved."""
    row = "gather", ("fsdp",)
    moved, predicted = found.moved["training step"][row], found.predicted["training step"][row]
    assert moved == pytest.approx(predicted, rel=tolerance)


def test_the_command_line_plans_what_is_predicted(tmp_path):
    found = plan(tmp_path, "8", (2, 2, 2), *SMALL, "--grad-accum", "2")
    check_collectives(found)
    check_gathers(found)
    assert "8 (virtual, of this CPU): data 2 x fsdp 2 x tensor 2" in found.said
    for name, program in found.programs.items():
        assert re.search(rf"^{name} +given [\d.]+ [kM]B", found.said, re.MULTILINE)
        assert program["kernels"] is program["expected_seconds"] is None
    assert len(found.programs) == 4
    gathered = re.search(r"sends over fsdp: ([\d.]+) [kM]B \(.*all-gather", found.said)
    assert float(gathered[1]) > 0


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 1, 4)])
def test_gradients_cross_data_once(tmp_path, sizes):
    """And not in each of the two micro-batches."""
    found = plan(tmp_path, "8", sizes, *SMALL, "--grad-accum", "2")
    check_collectives(found)
    moved, predicted = found.moved["training step"], found.predicted["training step"]
    assert moved["reduce", ("data",)] == pytest.approx(predicted["reduce", ("data",)], rel=0.05)
    assert moved["reduce", ("data", "fsdp")] < 0.01 * moved["reduce", ("data",)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (4, 1, 2)])
def test_plans_of_other_meshes(tmp_path, sizes):
    found = plan(tmp_path, "8", sizes, *SMALL, "--grad-accum", "2")
    check_collectives(found)
    check_gathers(found)


def factors_of_products(text: str) -> set[str]:
    """The types of the factors of all matrix products in a program of XLA."""
    types = {}  # of each instruction; a tuple has several
    for name, result in re.findall(
        r"^ *(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ", text, re.MULTILINE
    ):
        types[name] = re.findall(r"(\w+)\[", result)
    found = set()
    for factors in re.findall(r" dot\(([^()]*)\)", text):
        for factor in factors.split(", "):
            name, _, element = factor.lstrip("%").partition("#")
            found.add(types[name][int(element or 0)])
    return found


@needs_cuda
@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1), (4, 1, 2)])
def test_gpus_run_what_is_predicted(tmp_path, sizes):
    """Each program has kernels, a time, and lines of ours. Attention is cuDNN's, products have
    factors in bfloat16, and decoding keeps no copy of the cache and never waits for the host to see
    what it has computed."""
    found = plan(tmp_path, "h100:8", sizes, *SMALL, "--seq-len", "1024", "--grad-accum", "1")
    check_collectives(found)
    check_gathers(found)
    (dumped,) = tmp_path.glob("*train_step*.before_optimizations.txt")
    text = dumped.read_text()
    assert factors_of_products(text) == {"bf16"}
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    for program in found.programs.values():
        assert program["kernels"] > 0 and program["moved_bytes"] > 0 and program["flops"] > 0
        assert program["likely_seconds"] >= program["expected_seconds"]
        assert program["expected_seconds"] >= program["floor_seconds"] > 0
        assert any(kernel["line"].startswith("gpt/model/") for kernel in program["top"])
    for name in ("prefill", "decode step"):
        longest = [kernel["name"] for kernel in found.programs[name]["top"]]
        assert any("dot_product_attention" in kernel for kernel in longest)
    cache = 2 * 2 * 8 * 1024 * 64 * 2 // sizes[2]  # of two blocks, on one device
    assert found.programs["decode step"]["temporary_bytes"] < cache / 4
    for name in ("prefill", "decode step", "decode loop"):
        program = found.programs[name]
        assert program["data_dependent_loops"] == program["conditionals"] == 0
    assert "h100:8" in found.said and "not measured" in found.said
    assert found.said.count(" of 60.0 GB: fits") == 4


@needs_cuda
def test_decoding_on_a_gpu_converts_no_matrix(tmp_path):
    """At GPT-2's width all temporaries of a step together are smaller than one of its matrices."""
    found = plan(tmp_path, "h100:1", (1, 1, 1), "--model.n-layers", "2", "--grad-accum", "64")
    assert found.programs["decode step"]["temporary_bytes"] < 768 * 3072 * 2


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 4, 2)])
def test_tpus_send_what_is_predicted(tmp_path, sizes):
    """Windowed and fused collectives included, and kernels are unknown. Attention is fused: the
    scores of all pairs of tokens never stand in memory."""
    few_blocks = ["--model.n-layers", "4", "--batch-size", "64", "--grad-accum", "1"]
    found = plan(tmp_path, "v5e:4x4", sizes, *few_blocks)
    check_gathers(found, tolerance=0.01)
    row = "reduce", ("fsdp",)
    reduced, reductions = (rows["training step"][row] for rows in (found.moved, found.predicted))
    assert reduced == pytest.approx(reductions, rel=0.05)
    assert "reduce-scatter" in found.programs["training step"]["sent"]["fsdp"]
    moved, predicted = found.moved["decode step"], found.predicted["decode step"]
    assert sum(moved.values()) == pytest.approx(sum(predicted.values()), rel=0.05)
    scores = 8 * 12 * 1024**2 * 2 // sizes[2]
    assert found.programs["prefill"]["temporary_bytes"] < scores
    assert all(program["kernels"] is None for program in found.programs.values())
    assert all(program["floor_seconds"] > 0 for program in found.programs.values())
    assert found.said.count("of 16.0 GB: fits") == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology", "v5e:4x4"], "add --dry-run"),
        (["--dry-run", "--devices", "8", "--topology", "v5e:4x4"], "cannot be combined"),
        (["--dry-run", "--devices", "0"], "devices is 0: expected at least 1"),
        (["--dry-run", "--devices", "8", "--data", "x"], "a plan reads no text"),
        (["--dry-run", "--json", "plan.json"], "add --devices or --topology"),
        (["--dry-run", "--devices", "8", "--json", "none/plan.json"], "does not exist"),
    ],
)
def test_flags_that_make_no_plan_are_refused(flags, said):
    done = call("train", *flags)
    assert done.code == 2 and done.err.startswith("error: ") and said in done.err


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("x100:8", "expected a chip (a100, h100"),
        ("h100", "GPUs of a node as in h100:8"),
        ("v5e:16", "TPUs as in v5e:16x16"),
        ("h100:16", "up to 8 GPUs of a node"),
        ("h100:8", "pip install -e '.[cuda]'"),
        ("v5e:4x4", "pip install -e '.[tpu]'"),
    ],
)
def test_devices_that_cannot_be_planned_for_are_refused(topology, said, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(said)):
        devices.topology_devices(topology)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.83G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.83G of 15.75G hbm.",
    ],
)
def test_what_a_chip_lacks_is_told_in_few_words(message):
    assert absent.shortfall(message) == "takes 18.83GiB of 15.75GiB"
