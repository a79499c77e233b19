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

SLOW_MESHES = ["data", "fsdp", "tensor", "rows and heads"]


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
def mixed():
    """One device, and a mesh that splits rows, weights and heads."""
    return on_eight("meshes", "one", "all")


@pytest.fixture(scope="module")
def others():
    few = ["few heads, one", "few heads, tensor"]
    return on_eight("meshes", "one", *SLOW_MESHES, "pmap", *few)


@pytest.fixture(scope="module")
def ran(text, tmp_path_factory):
    """How a run on the mixed mesh ended, and its folder."""
    folder = tmp_path_factory.mktemp("mesh") / "run"
    return on_eight("run", folder, text), folder


def agrees(found, one):
    """The losses of one device, an evaluation too, and each array split as its sharding says."""
    assert np.allclose(found["losses"], one["losses"], rtol=1e-5, atol=0)
    assert len(set(one["losses"])) == 20
    assert found["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | found["mesh"]
    for path, array in (found["params"] | found["opt_state"]).items():
        names = [name for part in array["spec"] for name in np.atleast_1d(part or [])]
        parts = math.prod(sizes[name] for name in names)
        assert array["most"] * parts == array["bytes"], path


def test_a_mesh_gives_the_losses_of_one_device(mixed):
    agrees(mixed["all"], mixed["one"])
    assert mixed["all"]["notes"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_MESHES)
def test_every_mesh_gives_the_losses_of_one_device(name, others):
    agrees(others[name], others["one"])
    assert others[name]["notes"] == []


@pytest.mark.slow
def test_heads_that_do_not_divide_change_no_loss(others):
    agrees(others["few heads, tensor"], others["few heads, one"])
    assert len(others["few heads, tensor"]["notes"]) == 1


@pytest.mark.slow
def test_the_data_axis_is_the_data_parallelism_of_pmap(others):
    """With dropout and two micro-batches, which pmap's devices take as one."""
    losses = others["data"]["losses"]
    assert np.allclose(losses, others["pmap"]["losses"], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_five_hundred_steps_end(text, tmp_path):
    """Two steps in flight, evaluations and checkpoints between: no collective waits for another."""
    flags = ["--steps", "500", "--save-every", "500", "--eval-every", "100", "--sample-every", "0"]
    done = on_eight("run", tmp_path / "run", text, *flags)
    assert done["code"] == 0, done["err"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {x["step"]: x["loss"] for x in map(json.loads, lines) if "loss" in x}
    assert losses[500] < losses[1] / 2


def test_a_batch_that_does_not_divide_is_refused():
    config = TrainConfig(mesh=MeshConfig(2, 2, 2), batch_size=8, grad_accum=8)
    mesh = AbstractMesh((2, 2, 2), sharding.AXES)
    with pytest.raises(UserError, match=r"a micro-batch of 1 sequences .* among 4 devices"):
        train_step.require_fit(config, mesh)


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
