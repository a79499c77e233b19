"""Several devices compute what one computes, and each keeps only its part."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from programs import ROOT, TINY, arrays, call, same_losses

import gpt
from gpt import sharding
from gpt.model import transformer

MESHES = ["data", "fsdp", "tensor", "all", "rows and heads"]


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
def eight(text, tmp_path_factory):
    """What eight virtual devices gave, and the run they left."""
    folder = tmp_path_factory.mktemp("mesh") / "run"
    return on_eight(folder, text), folder


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_losses_of_one_device(name, eight):
    meshes = eight[0]["meshes"]
    assert np.allclose(meshes[name]["losses"], meshes["one"]["losses"], rtol=1e-5, atol=0)
    assert len(set(meshes["one"]["losses"])) == 20 and meshes[name]["notes"] == []


def test_the_data_axis_is_the_data_parallelism_of_pmap(eight):
    """With dropout and two micro-batches, which pmap's devices take as one."""
    losses = eight[0]["meshes"]["data"]["losses"]
    assert np.allclose(losses, eight[0]["pmap"], rtol=1e-5, atol=0)


def test_heads_that_do_not_divide_are_kept_whole_and_told(eight):
    found = eight[0]["few heads"]
    assert np.allclose(found["losses"], found["one"], rtol=1e-5, atol=0)
    assert found["notes"] == [
        "2 key/value heads do not divide among 4 devices: each keeps them all"
    ]
    kernels = {name: x for name, x in found["params"].items() if name.endswith("kernel")}
    split = {name.split("/")[-2]: x["most"] * 4 == x["bytes"] for name, x in kernels.items()}
    assert split["q"] and split["o"] and split["up"] and not split["k"] and not split["v"]


@pytest.mark.slow
def test_five_hundred_steps_end(text, tmp_path):
    """Two steps in flight, evaluations and checkpoints between: no collective waits for another."""
    done = on_eight(tmp_path / "run", text, "500")
    assert done["code"] == 0, done["err"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {x["step"]: x["loss"] for x in map(json.loads, lines) if "loss" in x}
    assert losses[500] < losses[1] / 2


def test_evaluation_is_the_same_on_a_mesh(eight):
    one, mixed = (eight[0]["meshes"][name]["evaluation"] for name in ("one", "all"))
    assert mixed == pytest.approx(one, rel=1e-5)


def leaves(found):
    """Weights and both moments: (name of the weight, layout), with the rest left out."""
    for name, layout in found["params"].items():
        yield name, layout
    for path, layout in found["optimizer"].items():
        weight = path.split("mu/")[-1].split("nu/")[-1]
        if weight in found["params"]:
            yield weight, layout


@pytest.mark.parametrize("name", MESHES)
def test_every_leaf_lies_as_the_table_says(name, eight):
    found = eight[0]["meshes"][name]
    config = gpt.ModelConfig(300, context_length=16, n_layers=2, n_heads=4, d_model=32)
    axes = named(transformer.logical_axes(config))
    counted = 0
    for weight, layout in leaves(found):
        wanted = [list(a) if isinstance(a, tuple) else a for a in sharding.spec(*axes[weight])]
        assert trimmed(layout["spec"]) == trimmed(wanted), weight
        counted += 1
    assert counted == 3 * len(found["params"]) == 3 * len(axes)


def named(tree, prefix=""):
    """The leaves of a nested dict by path."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    below = [named(v, f"{prefix}/{k}" if prefix else k) for k, v in tree.items()]
    return {k: v for part in below for k, v in part.items()}


def trimmed(spec):
    """A partition without the trailing axes that are not split."""
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return spec


def test_fsdp_keeps_an_eighth_on_each_device(eight):
    found = eight[0]["meshes"]["fsdp"]
    everything = [layout for _, layout in leaves(found)]
    split = [x for x in everything if x["most"] * 8 == x["bytes"]]
    assert all(x in split or x["most"] == x["bytes"] for x in everything)
    assert sum(x["bytes"] for x in split) > 0.95 * sum(x["bytes"] for x in everything)
    on_data = eight[0]["meshes"]["data"]
    assert all(x["most"] == x["bytes"] for _, x in leaves(on_data))


def test_a_batch_that_does_not_divide_is_refused(eight):
    refused = eight[0]["refused"]
    assert refused["code"] == 2
    assert "a micro-batch of 1 sequences" in refused["err"]
    assert "does not divide among 4 devices" in refused["err"]


def test_a_run_on_a_mesh_is_a_run_anywhere(text, eight, tmp_path):
    """Written on (2, 2, 2) and read on one device; trained there, it comes out the same."""
    ran, folder = eight[0]["ran"], eight[1]
    assert ran["code"] == 0, ran["err"]
    assert "on 8 device(s)" in ran["err"] and ran["err"].count("--- sample ---") == 2
    assert gpt.load(folder).generate("the ", max_new_tokens=4).token_ids
    argv = [*TINY, "--batch-size", "8", "--data", text]
    assert call("train", *argv, "--out", tmp_path / "one").code == 0
    assert arrays(folder, 12).keys() == arrays(tmp_path / "one", 12).keys()
    assert same_losses(folder, tmp_path / "one")


def test_a_run_of_a_mesh_continues_on_one_device(text, eight):
    """From step 8, its mesh forgotten."""
    folder = eight[1]
    shutil.rmtree(folder / "checkpoints" / "12")
    before = arrays(folder, 8)
    done = call("train", *TINY, "--batch-size", "8", "--data", text, "--out", folder)
    assert done.code == 0 and "on 1 device(s)" in done.err
    after = arrays(folder, 12)
    assert int(before["optimizer/step"]) == 8 and int(after["optimizer/step"]) == 12
