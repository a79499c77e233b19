"""Experiment trackers: TensorBoard, Weights & Biases, Trackio.

Each gets the settings once, then numbers and samples as they are logged. A failing tracker never
stops training.
"""

import html
import importlib
import importlib.util
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt.errors import one_line, require

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
ID_FILE = "tracking-id"  # in the run's folder, so that trackers see a resumed run as one run
PROJECT = "gpt-jax"


class TensorBoard:
    """Event files in DIR/tensorboard."""

    def __init__(self, out: Path, steps_done: int, settings: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        # An earlier process may have written events for steps that are now repeated.
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=steps_done + 1)
        if steps_done == 0:
            lines = [f"    {name}: {value}" for name, value in settings.items()]
            self.writer.add_text("settings", "\n".join(lines), 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def sample(self, step: int, text: str) -> None:
        self.writer.add_text("sample", f"<pre>{html.escape(text)}</pre>", step)

    def close(self) -> None:
        self.writer.close()


class Board:
    """wandb, or trackio, which has the same API.

    Their own environment variables set the server, account and folder.
    """

    def __init__(self, name: str, out: Path, identity: str, settings: Mapping[str, Any]):
        self.package = importlib.import_module(name)
        options = {"config": dict(settings), "resume": "allow"}
        if name == "wandb":
            quiet = self.package.Settings(console="off")
            project = self.package.setup().settings.project or PROJECT
            options |= {"project": project, "name": out.name, "id": identity}
            self.package.init(**options, dir=str(out), settings=quiet)
        else:
            self.package.init(PROJECT, name=f"{out.name}-{identity}", **options, embed=False)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.package.log(dict(values), step=step)

    def sample(self, step: int, text: str) -> None:
        shown = self.package.Html(f"<pre>{html.escape(text)}</pre>")
        self.package.log({"sample": shown}, step=step)

    def close(self) -> None:
        self.package.finish()


class Trackers:
    """A run's trackers. A failing one is dropped, with a note to `log`."""

    def __init__(
        self,
        names: Iterable[str],
        out: Path,
        steps_done: int,
        settings: Mapping[str, Any],
        log: Callable[[str], None],
    ):
        self.log = log
        self.open: dict[str, TensorBoard | Board] = {}
        id_file = out / ID_FILE
        if steps_done == 0 or not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        for name in names:
            try:
                if name == "tensorboard":
                    self.open[name] = TensorBoard(out, steps_done, settings)
                else:
                    self.open[name] = Board(name, out, id_file.read_text(), settings)
            except Exception as error:  # a tracker may raise anything
                self._leave_out(name, error)

    def numbers(self, record: Mapping[str, Any]) -> None:
        """Send the finite values of `record`, a line of metrics.jsonl."""
        values = {
            name: value for name, value in record.items() if name != "step" and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.numbers(record["step"], values))

    def sample(self, step: int, text: str) -> None:
        """Send what the model wrote at `step`."""
        self._each(lambda tracker: tracker.sample(step, text))

    def close(self) -> None:
        """Let each tracker send what it has buffered."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[TensorBoard | Board], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                call(tracker)
            except Exception as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self.open.pop(name, None)
        self.log(
            f"note: {name} gets no more data ({one_line(error)}); metrics.jsonl has everything"
        )


def require_installed(names: Iterable[str]) -> None:
    """Raise UserError unless these trackers' packages are installed."""
    for name in names:
        require(
            importlib.util.find_spec(PACKAGES[name]) is not None,
            f"--log-to {name} needs {PACKAGES[name]}, which is not installed: pip install "
            f"-e '.[{name}]', or train without it (metrics.jsonl has the same data)",
        )
