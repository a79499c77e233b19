"""Plans on virtual devices: what is predicted, what is compiled, and the arrays themselves."""

import json
import os
import re
import subprocess
import sys

import pytest
from programs import ROOT, call

from gpt.plan import absent

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*words):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    return subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def check_meshes(*names):
    """Compile for these meshes, and hold what is found against predictions and real arrays."""
    done = run(ROOT / "tests" / "plan" / "on_eight.py", *names)
    assert done.returncode == 0, done.stderr
    assert "nvoluntary" not in done.stderr and "rematerialization" not in done.stderr
    for name, found in json.loads(done.stdout).items():
        check_traffic(name, found["train"])
        if name == "kept":
            continue
        # The bytes of the state are those of its arrays, and of what the programs are given.
        assert found["planned"] == found["arrays"]
        planned = sum(found["planned"].values())
        assert found["train"]["given"] == pytest.approx(planned, rel=0.1)
        assert found["decode"]["given"] == pytest.approx(found["sampling"], rel=0.1)
        # Decoding moves neither weights nor cache.
        check_traffic(name, found["prefill"])
        moved, predicted = (sum(found["decode"][kind].values()) for kind in ("moved", "predicted"))
        assert moved <= 1.2 * predicted + 4096  # and a few numbers per row


def check_traffic(name, program):
    """Every large collective is a predicted one; fsdp gathers what is predicted."""
    total = sum(program["moved"].values())
    for row in {*program["moved"], *program["predicted"]}:
        moved, predicted = (program[kind].get(row, 0) for kind in ("moved", "predicted"))
        assert abs(moved - predicted) <= 0.05 * total, (name, row)
        if row == "gather/fsdp":
            assert moved == pytest.approx(predicted, rel=0.05), name


def test_compiled_programs_move_the_predicted_bytes():
    check_meshes("2-2-2")


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    reason="without recomputation the CPU's program gathers the attention's matrices once per "
    "micro-batch and the MLP's twice per step, where it gathered all of them once",
)
def test_without_recomputation_matrices_are_gathered_once():
    check_meshes("kept")


@pytest.mark.slow
def test_programs_of_other_meshes_move_the_predicted_bytes():
    check_meshes("8-1-1", "1-8-1", "1-1-4", "4-1-2")


def test_the_command_line_plans_for_many_devices(tmp_path):
    """Four parts cannot share the preset's micro-batches: it says so, and how to train."""
    flags = ["--dry-run", "--devices", "8", "--mesh.fsdp", "4", "--mesh.tensor", "2"]
    small = ["--model.n-layers", "1", "--model.d-model", "64", "--model.n-heads", "2"]
    small += ["--tokenizer", "byte", "--seq-len", "32", "--batch-size", "64"]
    done = run(ROOT / "train.py", "gpt2", *small, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "8 (virtual, of this CPU): data 1 x fsdp 4 x tensor 2" in done.stderr
    assert "train with --grad-accum 16" in done.stderr
    for program in ("training step", "prefill", "decode step"):
        assert re.search(rf"^{program} +given [\d.]+ MB", done.stderr, re.MULTILINE)
    gathered = re.search(r"sends over fsdp: ([\d.]+) MB \(.*all-gather", done.stderr)
    assert float(gathered[1]) > 0
    assert not (tmp_path / "run").exists()


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
