"""Plans on virtual devices: what is predicted, what is compiled, and the arrays themselves."""

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
from gpt.plan import absent
from gpt.presets import preset

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def plans(*names) -> dict:
    """What on_eight.py prints, which is a process of its own: JAX fixes the number of devices when
    it starts. The partitioner must not have moved anything whole for want of a better plan."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "plan" / "on_eight.py", *names],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "nvoluntary" not in done.stderr and "rematerialization" not in done.stderr
    return json.loads(done.stdout)


def check_plan(name, plan):
    """What is planned against the predicted bytes and the real arrays."""
    # The bytes of the state are those of its arrays, and of what the programs are given.
    assert plan["planned"] == plan["arrays"]
    assert plan["train"]["given"] == pytest.approx(sum(plan["planned"].values()), rel=0.1)
    assert plan["decode"]["given"] == pytest.approx(plan["sampling"], rel=0.1)

    # Every large collective is a predicted one; fsdp gathers what is predicted.
    for program in (plan["train"], plan["prefill"]):
        moved, predicted = program["moved"], program["predicted"]
        for row in {*moved, *predicted}:
            difference = abs(moved.get(row, 0) - predicted.get(row, 0))
            assert difference <= 0.05 * sum(moved.values()), (name, row)
            if row == "gather/fsdp":
                assert difference <= 0.05 * predicted[row], name

    # Decoding moves neither weights nor cache: what is predicted, and a few numbers per row.
    moved, predicted = (sum(plan["decode"][kind].values()) for kind in ("moved", "predicted"))
    assert moved <= 1.2 * predicted + 4096


def test_the_command_line_plans_what_is_predicted_and_what_arrays_take():
    plan = plans("2-2-2")["2-2-2"]
    check_plan("2-2-2", plan)
    said = plan["said"]
    assert "8 (virtual, of this CPU): data 2 x fsdp 2 x tensor 2" in said
    for program in ("training step", "prefill", "decode step"):
        assert re.search(rf"^{program} +given [\d.]+ MB", said, re.MULTILINE)
    gathered = re.search(r"sends over fsdp: ([\d.]+) MB \(.*all-gather", said)
    assert float(gathered[1]) > 0


def test_micro_batches_that_the_devices_cannot_share():
    """Eight parts cannot share the preset's 32 micro-batches of 2: it says so, and how to train."""
    args = SimpleNamespace(topology="v5e:2x4", train=preset("gpt2"))
    args.train = replace(args.train, batch_size=64)
    eight = SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 1})
    config = absent.with_micro_batches_that_divide(args.train, eight)
    assert config.grad_accum == 8
    mesh = sharding.make_mesh(MeshConfig())
    assert "train with --grad-accum 8" in "\n".join(absent.run_lines(args, config, mesh))


@pytest.mark.slow
def test_plans_of_other_meshes():
    """Without recomputation and written out, matrices are gathered once."""
    names = ("8-1-1", "1-8-1", "1-8-1-no-remat", "1-1-4", "4-1-2")
    for name, plan in plans(*names).items():
        check_plan(name, plan)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--devices", "8"], "add --dry-run"),
        (["--topology", "v5e:4x4"], "add --dry-run"),
        (["--dry-run", "--devices", "8", "--topology", "v5e:4x4"], "exclude each other"),
        (["--dry-run", "--devices", "0"], "devices is 0: expected at least 1"),
        (["--dry-run", "--devices", "8", "--data", "x"], "reads no text: drop --data"),
    ],
)
def test_flags_that_make_no_plan_are_refused(flags, said):
    done = call("train", *flags)
    assert done.code == 2 and done.err.startswith("error: ") and said in done.err


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
