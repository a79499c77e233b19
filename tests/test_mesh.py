"""Several devices compute what one computes, and each keeps only its part."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from programs import ROOT, TINY, arrays, call, same_losses

import gpt
from gpt import sharding
from gpt.config import MeshConfig, TrainConfig
from gpt.errors import UserError
from gpt.training import train_step


def on_eight(*words):
    """What eight virtual devices gave, in a process of their own."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "on_eight_devices.py", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,  # a deadlock of collectives would wait for ever
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ran(text, tmp_path_factory):
    """How a run on a mesh that splits rows, weights and heads ended, and its folder."""
    folder = tmp_path_factory.mktemp("mesh") / "run"
    return on_eight("run", folder, text), folder


def test_a_run_on_a_mesh_is_a_run_anywhere(text, ran, tmp_path):
    """Written on (2, 2, 2) and read on one device; trained there, it comes out the same."""
    done, folder = ran
    assert done["code"] == 0, done["err"]
    assert "on 8 device(s)" in done["err"] and done["err"].count("--- sample ---") == 2
    assert gpt.load(folder).generate("the ", max_new_tokens=4).token_ids
    argv = [*TINY, "--batch-size", "8", "--data", text]
    assert call("train", *argv, "--out", tmp_path / "one").code == 0
    assert arrays(folder, 12).keys() == arrays(tmp_path / "one", 12).keys()
    assert same_losses(folder, tmp_path / "one")


def test_a_run_of_a_mesh_continues_on_one_device(text, ran):
    """From step 8, its mesh forgotten."""
    folder = ran[1]
    shutil.rmtree(folder / "checkpoints" / "12")
    before = arrays(folder, 8)
    done = call("train", *TINY, "--batch-size", "8", "--data", text, "--out", folder)
    assert done.code == 0 and "on 1 device(s)" in done.err
    after = arrays(folder, 12)
    assert int(before["optimizer/step"]) == 8 and int(after["optimizer/step"]) == 12


def test_a_batch_that_does_not_divide_is_refused():
    config = TrainConfig(mesh=MeshConfig(2, 2, 2), batch_size=8, grad_accum=8)
    mesh = AbstractMesh((2, 2, 2), sharding.AXES)
    with pytest.raises(UserError, match=r"a micro-batch of 1 sequences .* among 4 devices"):
        train_step.require_fit(config, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("few_heads", ["", "few heads, "])
def test_every_mesh_trains_as_one_device(few_heads):
    """Losses and an evaluation; of each array a device has the part that its sharding says."""
    names = ["tensor"] if few_heads else ["data", "fsdp", "tensor", "all", "rows and heads"]
    found = on_eight("meshes", *(few_heads + name for name in ["one", *names]))
    one = found[few_heads + "one"]
    assert len(set(one["losses"])) == 20
    for name in names:
        mesh = found[few_heads + name]
        assert np.allclose(mesh["losses"], one["losses"], rtol=1e-5, atol=0), name
        assert mesh["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5), name
        assert len(mesh["notes"]) == bool(few_heads)
        for path, array in mesh["arrays"].items():
            axes = [axis for part in array["spec"] for axis in np.atleast_1d(part or [])]
            parts = math.prod(mesh["mesh"][axis] for axis in axes)
            assert array["most"] * parts == array["bytes"], path


@pytest.mark.slow
def test_the_data_axis_is_the_data_parallelism_of_pmap():
    """With dropout and two micro-batches, which pmap's devices take as one."""
    found = on_eight("meshes", "data", "pmap")
    assert np.allclose(found["data"]["losses"], found["pmap"]["losses"], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_five_hundred_steps_end(text, tmp_path):
    """Two steps in flight, evaluations and checkpoints between: no collective waits for another."""
    flags = ["--steps", "500", "--save-every", "500", "--eval-every", "100", "--sample-every", "0"]
    done = on_eight("run", tmp_path / "run", text, *flags)
    assert done["code"] == 0, done["err"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {x["step"]: x["loss"] for x in map(json.loads, lines) if "loss" in x}
    assert losses[500] < losses[1] / 2
