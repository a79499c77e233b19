"""The tests marked `exact`, in processes that compile as users do: see conftest.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
MARKED = sorted(path for path in FILES if "pytest.mark.exact" in path.read_text("utf-8"))


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.name)
def test_what_compares_bits(path, pytestconfig):
    if "not exact" not in pytestconfig.option.markexpr:
        pytest.skip("these tests run in this process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    done = subprocess.run(
        [*command, "-m", "exact and not slow and not parity"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
