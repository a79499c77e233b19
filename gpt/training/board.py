"""The numbers of a run as TensorBoard reads them, through tensorboardX, an optional extra."""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.errors import require


def require_installed() -> None:
    """UserError unless tensorboardX can be imported."""
    require(
        importlib.util.find_spec("tensorboardX") is not None,
        "--tensorboard writes with tensorboardX, which is not installed: "
        "pip install 'gpt-jax[tensorboard]', or train without the flag (metrics.jsonl has it all)",
    )


class Board:
    """Event files in `folder`: one scalar for each number, of the steps after `first`. Close it."""

    def __init__(self, folder: Path, first: int):
        from tensorboardX import SummaryWriter

        # What an earlier process wrote of later steps was given up with them.
        self.writer = SummaryWriter(str(folder), purge_step=first + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a line of the metrics."""
        for name, value in record.items():
            if name != "step" and math.isfinite(value):
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Bring all to disk."""
        self.writer.close()
