"""Sampling, searching and scoring on several devices give what one device gives."""

import json
import os
import subprocess
import sys

import pytest
from programs import ROOT

# One on 8 of 8 devices for rows, heads and both; one with fewer key/value heads than devices.
MESHES = ["data", "fsdp", "tensor", "both", "more than heads"]


@pytest.fixture(scope="module")
def eight():
    """What eight virtual devices gave, in a process of their own."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "sampling_on_eight_devices.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_draws_what_one_device_draws(name, eight):
    """Greedy, with all filters, alone, and by beam search; these models leave wide gaps."""
    one, mesh = eight["one"], eight[name]
    for what in ("greedy", "drawn", "alone", "beam"):
        assert mesh[what] == one[what], what
    assert len({tuple(row) for row in one["greedy"]}) > 4


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_scores_what_one_device_scores(name, eight):
    assert eight[name]["score"] == pytest.approx(eight["one"]["score"], abs=2e-5)


@pytest.mark.parametrize("name", ["one", *MESHES])
def test_the_cache_contract_holds_on_a_mesh(name, eight):
    assert eight[name]["check"].startswith("ok"), eight[name]["check"]
    assert eight[name]["again"] and eight[name]["compiled"] == 0


@pytest.mark.parametrize(
    ("name", "rows", "heads", "parts"),
    [
        ("data", "data", None, 8),
        ("tensor", None, "tensor", 4),
        ("both", "data", "tensor", 8),
        ("more than heads", None, None, 1),
    ],
)
def test_each_device_keeps_its_part_of_the_cache(name, rows, heads, parts, eight):
    for _, spec, n_bytes, most in eight[name]["cache"]:
        spec = [*spec, None, None][:2]
        assert spec == [rows, heads] and most * parts == n_bytes


@pytest.mark.parametrize(("name", "parts"), [("data", 1), ("fsdp", 1), ("tensor", 4), ("both", 2)])
def test_weights_are_split_over_tensor_alone(name, parts, eight):
    """Gathering them at each step would cost more than the step."""
    for path, spec, n_bytes, most in eight[name]["weights"]:
        split = "tensor" in spec
        assert most * (parts if split else 1) == n_bytes, path
        whole = ("o/bias", "down/bias")
        inner = ("/q/", "/k/", "/v/", "/o/", "/up/", "/down/", "tokens")  # not what is added once
        assert split == (any(word in path for word in inner) and not path.endswith(whole)), path


def test_heads_that_do_not_divide_are_kept_whole_and_told(eight):
    assert eight["more than heads"]["notes"] == [
        "4 key/value heads do not divide among 8 devices: each keeps them all"
    ]
    assert eight["tensor"]["notes"] == []
