"""Several devices train, sample and score what one does, and each keeps only its part."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from programs import ROOT, TINY, arrays, call, run_python, same_losses

import gpt


def on_eight(*tasks):
    """What tasks of eight_devices.py gave, in a process of their own."""
    done = run_python(ROOT / "tests" / "eight_devices.py", *map(json.dumps, tasks))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def eight(text, tmp_path_factory):
    """What eight devices gave by default: a run and its folder, a run of one device that they have
    continued, and samples beside one device's."""
    place = tmp_path_factory.mktemp("mesh")
    argv = [*TINY, "--batch-size", "8", "--data", text, "--out", place / "one"]
    assert call("train", *argv).code == 0
    shutil.copytree(place / "one", place / "continued")
    shutil.rmtree(place / "continued" / "checkpoints" / "12")
    runs = [("run", str(place / name), str(text)) for name in ("run", "continued")]
    run, continued, one, mesh = on_eight(*runs, ("sample", "one"), ("sample", "rows and heads"))
    return SimpleNamespace(place=place, run=run, continued=continued, one=one, mesh=mesh)


# Training.


def test_a_run_on_a_mesh_is_a_run_anywhere(text, eight):
    """Written on (2, 2, 2) and read on one device, or the other way round: all the same."""
    done, folder, one = eight.run, eight.place / "run", eight.place / "one"
    assert done["code"] == 0, done["err"]
    assert "on 8 devices" in done["err"] and done["err"].count("--- sample ---") == 2
    assert gpt.load(folder).generate("the ", max_new_tokens=4).token_ids
    assert arrays(folder, 12).keys() == arrays(one, 12).keys()
    assert same_losses(folder, one)

    shutil.rmtree(folder / "checkpoints" / "12")
    argv = [*TINY, "--batch-size", "8", "--data", text, "--out", folder]
    here, there = vars(call("train", *argv)), eight.continued
    for done, n_devices, run in ((here, 1, folder), (there, 8, eight.place / "continued")):
        assert done["code"] == 0, done["err"]
        assert f"on {n_devices} device" in done["err"] and "from step 8" in done["err"]
        assert same_losses(run, one) and int(arrays(run, 12)["optimizer/step"]) == 12


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_every_mesh_trains_as_one_device(n_kv_heads):
    """Losses and an evaluation; of each array a device has the part that its sharding says."""
    names = (
        ["tensor"]
        if n_kv_heads
        else ["data", "fsdp", "tensor", "all", "rows and heads", "rows and width"]
    )
    one, *meshes = on_eight(*(("train", name, n_kv_heads) for name in ["one", *names]))
    assert len(set(one["losses"])) == 20
    for name, mesh in zip(names, meshes, strict=True):
        assert np.allclose(mesh["losses"], one["losses"], rtol=1e-5, atol=0), name
        assert mesh["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5), name
        assert len(mesh["notes"]) == bool(n_kv_heads)
        for path, array in mesh["arrays"].items():
            axes = [axis for part in array["spec"] for axis in np.atleast_1d(part or [])]
            parts = math.prod(mesh["mesh"][axis] for axis in axes)
            assert array["most"] * parts == array["bytes"], path


@pytest.mark.slow
def test_five_hundred_steps_end(text, tmp_path):
    """Two steps in flight, evaluations and checkpoints between: no collective waits for another."""
    flags = ["--steps", "500", "--save-every", "500", "--eval-every", "100", "--sample-every", "0"]
    (done,) = on_eight(("run", str(tmp_path / "run"), str(text), *flags))
    assert done["code"] == 0, done["err"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {x["step"]: x["loss"] for x in map(json.loads, lines) if "loss" in x}
    assert losses[500] < losses[1] / 2


# Sampling, searching and scoring.


def check_sampled(one, mesh, rows, heads, parts_of_cache, parts_of_weights):
    """Greedy, with all filters, alone, and by beam search; these models leave wide gaps. The cache
    is split over `rows` and `heads`, weights over `tensor` alone: gathering them at each step would
    cost more than the step."""
    for what in ("greedy", "drawn", "alone", "beam"):
        assert mesh[what] == one[what], what
    assert mesh["speculated"] == one["drawn"] and mesh["accepted"] > 50
    assert len({tuple(row) for row in one["greedy"]}) > 4
    assert mesh["score"] == pytest.approx(one["score"], abs=2e-5)
    assert mesh["answers"] == pytest.approx(one["answers"], abs=1e-4) and len(one["answers"]) == 3
    for found in (one, mesh):
        assert found["again"] and found["compiled"] == 0

    for array in mesh["cache"].values():
        assert [*array["spec"], None, None][:2] == [rows, heads]
        assert array["most"] * parts_of_cache == array["bytes"]
    inner = ("/q/", "/k/", "/v/", "/o/", "/up/", "/down/", "tokens")  # not what is added once
    for path, array in mesh["weights"].items():
        split = "tensor" in array["spec"]
        assert array["most"] * (parts_of_weights if split else 1) == array["bytes"], path
        if parts_of_weights > 1:
            is_inner = any(word in path for word in inner)
            assert split == (is_inner and not path.endswith(("o/bias", "down/bias"))), path


def test_a_mesh_samples_and_scores_what_one_device_does(eight):
    check_sampled(eight.one, eight.mesh, "data", "tensor", parts_of_cache=8, parts_of_weights=2)


@pytest.mark.slow
def test_other_meshes_sample_and_score_what_one_device_does():
    names = ["one", "data", "fsdp", "tensor", "more devices than heads"]
    one, data, fsdp, tensor, more = found = on_eight(*(("sample", name, True) for name in names))
    assert all(mesh["check"].startswith("ok") for mesh in found)
    check_sampled(one, data, "data", None, 8, 1)
    check_sampled(one, fsdp, "fsdp", None, 8, 1)
    check_sampled(one, tensor, None, "tensor", 4, 4)
    assert tensor["notes"] == []
    for what in ("greedy", "drawn", "alone", "beam"):
        assert more[what] == one[what], what
    assert more["notes"] == [
        "4 key/value heads do not divide evenly among 8 devices, so each keeps them all"
    ]
