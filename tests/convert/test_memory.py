"""The memory of importing a large model."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
def test_gpt2_xl_fits_in_little_more_than_its_file():
    """3.1 GB in bfloat16, written, imported by a process of its own, and removed."""
    path = Path(__file__).parents[2] / "benchmarks/importing.py"
    spec = importlib.util.spec_from_file_location("importing", path)
    importing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(importing)
    found = importing.measure("gpt2-xl", "bfloat16")
    assert found["file_bytes"] > 3.1e9
    assert found["ratio"] < 1.3
