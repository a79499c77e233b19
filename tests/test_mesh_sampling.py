"""Sampling, searching and scoring on several devices give what one device gives."""

import functools
import json
import os
import subprocess
import sys

import pytest
from programs import ROOT

DEFAULT = ["both"]
SLOW = ["data", "fsdp", "tensor", "more than heads"]  # the last has fewer heads than devices
MESHES = [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@functools.cache
def on_eight(*names):
    """What one device and these meshes of eight virtual devices gave, in a process of their own."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "sampling_on_eight_devices.py", "one", *names],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def one_and(name):
    """What one device gave, and what the named mesh did."""
    found = on_eight(*(DEFAULT if name in DEFAULT else SLOW))
    return found["one"], found[name]


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_draws_and_scores_what_one_device_does(name):
    """Greedy, with all filters, alone, and by beam search; these models leave wide gaps."""
    one, mesh = one_and(name)
    for what in ("greedy", "drawn", "alone", "beam"):
        assert mesh[what] == one[what], what
    assert len({tuple(row) for row in one["greedy"]}) > 4
    assert mesh["score"] == pytest.approx(one["score"], abs=2e-5)


@pytest.mark.parametrize("name", MESHES)
def test_the_cache_contract_holds_on_a_mesh(name):
    for found in one_and(name):
        assert found["check"].startswith("ok"), found["check"]
        assert found["again"] and found["compiled"] == 0


@pytest.mark.parametrize(
    ("name", "rows", "heads", "parts"),
    [
        ("both", "data", "tensor", 8),
        pytest.param("data", "data", None, 8, marks=pytest.mark.slow),
        pytest.param("tensor", None, "tensor", 4, marks=pytest.mark.slow),
        pytest.param("more than heads", None, None, 1, marks=pytest.mark.slow),
    ],
)
def test_each_device_keeps_its_part_of_the_cache(name, rows, heads, parts):
    _, mesh = one_and(name)
    for _, spec, n_bytes, most in mesh["cache"]:
        spec = [*spec, None, None][:2]
        assert spec == [rows, heads] and most * parts == n_bytes


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("both", 2),
        pytest.param("data", 1, marks=pytest.mark.slow),
        pytest.param("fsdp", 1, marks=pytest.mark.slow),
        pytest.param("tensor", 4, marks=pytest.mark.slow),
    ],
)
def test_weights_are_split_over_tensor_alone(name, parts):
    """Gathering them at each step would cost more than the step."""
    _, mesh = one_and(name)
    for path, spec, n_bytes, most in mesh["weights"]:
        split = "tensor" in spec
        assert most * (parts if split else 1) == n_bytes, path
        whole = ("o/bias", "down/bias")
        inner = ("/q/", "/k/", "/v/", "/o/", "/up/", "/down/", "tokens")  # not what is added once
        assert split == (any(word in path for word in inner) and not path.endswith(whole)), path


@pytest.mark.slow
def test_heads_that_do_not_divide_are_kept_whole_and_told():
    assert one_and("more than heads")[1]["notes"] == [
        "4 key/value heads do not divide among 8 devices: each keeps them all"
    ]
    assert one_and("tensor")[1]["notes"] == []
