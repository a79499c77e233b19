"""Saved checkpoints to read from or to damage."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for trees.py, in every file here


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 and 2, to read from or to copy."""
    import trees

    folder = tmp_path_factory.mktemp("run")
    trees.save(folder, 1, 2)
    return folder


@pytest.fixture
def mine(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))
