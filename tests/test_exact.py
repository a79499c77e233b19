"""The tests marked `exact`, in a process that compiles as users do: see conftest.py."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_what_compares_bits(pytestconfig):
    if "not exact" not in pytestconfig.option.markexpr:
        pytest.skip("these tests run in this process")
    files = [path for path in TESTS.rglob("test_*.py") if "mark.exact" in path.read_text("utf-8")]
    flags = ["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "exact and not slow and not parity"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *files],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
