"""Plans for devices that are not here, on virtual ones: predicted, compiled, and the arrays."""

import json
import os
import re
import subprocess
import sys

import pytest
from programs import ROOT, call

from gpt.plan import absent

MESHES = ["8-1-1", "1-8-1", "1-1-4", "2-2-2", "4-1-2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*words):
    """A process of its own: the number of devices is fixed when JAX starts."""
    return subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def eight():
    """What each mesh gave, and what the partitioner said meanwhile."""
    done = run(ROOT / "tests" / "pod" / "on_eight.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", MESHES)
def test_predicted_bytes_are_those_of_the_arrays(name, eight):
    found = eight[0][name]
    assert found["planned"] == found["arrays"]
    planned = sum(found["planned"].values())
    assert found["train"]["given"] == pytest.approx(planned, rel=0.1)
    assert found["decode"]["given"] == pytest.approx(found["sampling"], rel=0.1)


@pytest.mark.parametrize("name", ["1-8-1", "2-2-2", "kept"])
def test_fsdp_gathers_what_arithmetic_says(name, eight):
    train = eight[0][name]["train"]
    assert train["moved"]["gather/fsdp"] == pytest.approx(
        train["predicted"]["gather/fsdp"], rel=0.05
    )


@pytest.mark.parametrize("name", MESHES)
def test_every_large_collective_is_a_predicted_one(name, eight):
    for program in ("train", "prefill"):
        found = eight[0][name][program]
        total = sum(found["moved"].values())
        for row in {*found["moved"], *found["predicted"]}:
            moved, predicted = (found[kind].get(row, 0) for kind in ("moved", "predicted"))
            assert abs(moved - predicted) <= 0.05 * total, (program, row)


@pytest.mark.parametrize("name", MESHES)
def test_decoding_moves_neither_weights_nor_cache(name, eight):
    decode = eight[0][name]["decode"]
    moved, predicted = (sum(decode[kind].values()) for kind in ("moved", "predicted"))
    assert moved <= 1.2 * predicted + 4096  # and a few numbers a row


def test_nothing_is_rematerialized_whole(eight):
    assert "nvoluntary" not in eight[1] and "rematerialization" not in eight[1]


def test_the_command_line_plans_for_many(tmp_path):
    """Micro-batches of the preset that 32 devices cannot share are changed, and it says so."""
    flags = ["--dry-run", "--devices", "128", "--mesh.fsdp", "32", "--mesh.tensor", "4"]
    small = ["--model.n-layers", "2", "--out", tmp_path / "run"]
    done = run(ROOT / "train.py", "gpt2", *flags, *small)
    assert done.returncode == 0, done.stderr
    assert "128 (virtual, of this CPU): data 1 x fsdp 32 x tensor 4" in done.stderr
    assert "train with --grad-accum 16" in done.stderr
    moved = re.search(r"gathered over fsdp: (.*) MB, predicted (.*) MB", done.stderr).groups()
    gathered, predicted = (float(n.replace(",", "")) for n in moved)
    assert gathered == pytest.approx(predicted, rel=0.05) and "decode step" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_does_not_divide_is_refused_by_name():
    flags = ["--dry-run", "--devices", "256", "--mesh.fsdp", "64", "--mesh.tensor", "4"]
    done = run(ROOT / "train.py", "gpt2-xl", *flags)
    assert done.returncode == 2
    assert done.stderr == (
        "error: model.n_heads is 25, which --mesh.tensor 4 does not divide: choose a divisor\n"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--devices", "8"], "give --dry-run too"),
        (["--topology", "v5e:4x4"], "give --dry-run too"),
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
