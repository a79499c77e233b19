"""The tests marked `exact`, in a process that compiles as users do: see conftest.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
MARKED = sorted(path for path in FILES if "pytest.mark.exact" in path.read_text("utf-8"))


def test_what_compares_bits(pytestconfig):
    if "not exact" not in pytestconfig.option.markexpr:
        pytest.skip("these tests run in this process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *MARKED]
    marked = ["-m", "exact and not slow and not parity"]
    done = subprocess.run([*command, *marked], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
