"""Plans for devices that are not here: what is predicted and what is compiled.

Those for GPUs and TPUs need the compiler of these, in an environment of its own.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from programs import ROOT, call

from gpt import sharding
from gpt.config import MeshConfig
from gpt.errors import UserError
from gpt.plan import absent, devices
from gpt.presets import preset

HAS_CUDA = importlib.util.find_spec("jax_cuda13_plugin") is not None
HAS_TPU = importlib.util.find_spec("libtpu") is not None
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs the CUDA build of JAX")
needs_tpu = pytest.mark.skipif(not HAS_TPU, reason="needs libtpu")
OURS = "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS"  # without them: as a user compiles


def plan(where: str, mesh: str, *flags: str) -> dict:
    """What compiled.py prints. The partitioner must not have moved anything whole for want of a
    better plan."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if not where.isdigit():
        environment = {name: value for name, value in environment.items() if name not in OURS}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "plan" / "compiled.py", where, mesh, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert "nvoluntary" not in done.stderr and "rematerialization" not in done.stderr
    return json.loads(done.stdout)


def check_plan(found: dict) -> None:
    """What is compiled against the bytes that are predicted."""
    train, decode = (found["programs"][name] for name in ("training step", "decode step"))
    assert train["given_bytes"] == pytest.approx(sum(found["state"].values()), rel=0.1)
    assert decode["given_bytes"] == pytest.approx(found["sampling"], rel=0.1)

    # Every large collective is a predicted one.
    for name in ("training step", "prefill"):
        moved, predicted = found["moved"][name], found["predicted"][name]
        for row in {*moved, *predicted}:
            difference = abs(moved.get(row, 0) - predicted.get(row, 0))
            assert difference <= 0.05 * sum(moved.values()), (name, row)

    # Decoding moves neither weights nor cache: what is predicted, and a few numbers per row.
    moved, predicted = (sum(found[kind]["decode step"].values()) for kind in ("moved", "predicted"))
    assert moved <= 1.2 * predicted + 4096


def check_gathers(found: dict) -> None:
    """fsdp gathers what is predicted, however little that is of all that is moved."""
    moved, predicted = (found[kind]["training step"] for kind in ("moved", "predicted"))
    gathered = moved.get("gather/fsdp", 0)
    assert gathered == pytest.approx(predicted.get("gather/fsdp", 0), rel=0.05)


def test_the_command_line_plans_what_is_predicted():
    found = plan("8", "2-2-2")
    check_plan(found)
    check_gathers(found)
    assert "8 (virtual, of this CPU): data 2 x fsdp 2 x tensor 2" in found["said"]
    for program in ("training step", "prefill", "decode step", "decode loop"):
        assert re.search(rf"^{program} +given [\d.]+ MB", found["said"], re.MULTILINE)
        assert found["programs"][program]["expected_seconds"] is None
    gathered = re.search(r"sends over fsdp: ([\d.]+) MB \(.*all-gather", found["said"])
    assert float(gathered[1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--no-remat", "--unroll"]])
@pytest.mark.parametrize("mesh", ["8-1-1", "1-8-1", "4-1-2"])
def test_plans_of_other_meshes(mesh, flags):
    """Without recomputation and written out, matrices are gathered once."""
    found = plan("8", mesh, *flags)
    check_plan(found)
    check_gathers(found)


@needs_cuda
@pytest.mark.parametrize("mesh", ["1-8-1", "2-2-2"])
def test_gpus_run_what_is_predicted(mesh):
    """Weights are gathered and sums reduced as on other devices, and each program has kernels, a
    time, and lines of ours; training and prefill call cuDNN's attention, and nothing in decoding
    needs a copy of the cache."""
    found = plan("h100:8", mesh)
    check_plan(found)
    for program in found["programs"].values():
        assert program["kernels"] > 0 and program["moved_bytes"] > 0 and program["flops"] > 0
        assert program["expected_seconds"] >= program["floor_seconds"] > 0
        assert any(kernel["line"].startswith("gpt/model/") for kernel in program["top"])
    assert found["library_calls"]["training step"] >= 2  # forward and back
    assert found["library_calls"]["prefill"] >= 2  # one a block
    assert found["programs"]["decode step"]["temporary_bytes"] < found["sampling"] / 10
    assert "h100:8" in found["said"] and "not measured" in found["said"]
    assert found["said"].count("MB of 60,000 MB: fits") == 4


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1-16-1", "2-4-2"])
def test_tpus_send_what_is_predicted(mesh):
    """Windowed and fused collectives included. Their memory is padded to whole tiles."""
    gpt2 = ["--model.n-layers", "4", "--model.d-model", "768", "--model.n-heads", "12"]
    found = plan("v5e:4x4", mesh, *gpt2, "--seq-len", "1024")
    train = found["moved"]["training step"], found["predicted"]["training step"]
    gathered, gathers = (rows["gather/fsdp"] for rows in train)
    reduced, reductions = (rows["reduce/fsdp"] for rows in train)
    assert gathered == pytest.approx(gathers, rel=0.01)
    assert reduced == pytest.approx(reductions, rel=0.05)
    assert "reduce-scatter" in found["programs"]["training step"]["sent"]["fsdp"]
    moved, predicted = (sum(found[kind]["decode step"].values()) for kind in ("moved", "predicted"))
    assert moved == pytest.approx(predicted, rel=0.05)
    assert found["programs"]["training step"]["kernels"] is None
    assert found["programs"]["decode step"]["floor_seconds"] > 0
    assert found["library_calls"]["prefill"] >= 4  # fused attention, one a block
    assert found["said"].count("of 16,000 MB: fits") == 4


def test_micro_batches_that_the_devices_cannot_share():
    """Eight parts cannot share the preset's 32 micro-batches of 2: it says so, and how to train."""
    args = SimpleNamespace(topology="v5e:2x4", train=preset("gpt2"))
    args.train = replace(args.train, batch_size=64)
    eight = SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 1})
    config = absent.with_micro_batches_that_divide(args.train, eight)
    assert config.grad_accum == 8
    lines = absent.run_lines(args, config, sharding.make_mesh(MeshConfig()), devices.CHIPS["v5e"])
    assert "train with --grad-accum 8" in "\n".join(lines)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--devices", "8"], "add --dry-run"),
        (["--topology", "v5e:4x4"], "add --dry-run"),
        (["--dry-run", "--devices", "8", "--topology", "v5e:4x4"], "exclude each other"),
        (["--dry-run", "--devices", "0"], "devices is 0: expected at least 1"),
        (["--dry-run", "--devices", "8", "--data", "x"], "reads no text: drop --data"),
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
        ("h100:0", "up to 8 GPUs of a node"),
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
