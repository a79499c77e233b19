"""What a run says of itself: metrics.jsonl, the progress bar, the picture of its losses.

Knows no model and no data: numbers come in, lines and pictures go out.
"""

import contextlib
import errno
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gpt.config import TrainConfig
from gpt.training.board import Board
from gpt.training.speed import Speed

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal to draw a bar on


class Steadfast:
    """A stream on which no writing fails, where the terminal is gone or the disk of a log full."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        """Write `text`; what cannot be written is lost, and so is all that follows."""
        self.attempt(self.stream.write, text)

    def flush(self) -> None:
        """Bring all to where it goes."""
        self.attempt(self.stream.flush)

    def attempt(self, act: Callable, *words: str) -> None:
        """`act`, or from now on write to nowhere: what it keeps would fail again at the end."""
        try:
            act(*words)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_console(quiet: bool) -> Console:
    """Where a run speaks: standard error, without colours in the text or lines broken."""
    plain = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
    return Console(file=Steadfast(sys.stderr), quiet=quiet, **plain)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in order, without a torn line; none if there is no file."""
    with contextlib.suppress(FileNotFoundError):
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        return [record for line in lines if (record := parse(line))]
    return []


def parse(line: str) -> dict[str, Any] | None:
    """The object on one line, or None where the line is torn."""
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
    return None


def open_metrics(path: str | Path | None, step: int) -> BinaryIO:
    """metrics.jsonl, ready to take the lines after `step`: later ones and a torn one are dropped.

    The lines that stay are written aside and renamed, so that no crash loses them. None: a file
    that keeps nothing.
    """
    path = Path(path or os.devnull)
    if str(path) == os.devnull:
        return path.open("ab", buffering=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(to_line(r) for r in read_metrics(path) if r["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return path.open("ab", buffering=0)


def to_line(record: Mapping[str, Any]) -> str:
    """One line of JSON; what is not a number there, NaN and infinities, becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


@contextlib.contextmanager
def tokenizing(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over the bytes of text, shown only if there is work to do."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("tokenizing", visible=False)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        yield report


class RunLog:
    """Takes the numbers of a run as it goes: to metrics.jsonl, and to `console` as they suit it.

    `path`: None keeps no file. `first`: the step the run continues from. `peak`: as in speed.Speed.
    `board`: takes each line too. Close it, or use it in `with`.
    """

    def __init__(
        self,
        path: str | Path | None,
        first: int,
        config: TrainConfig,
        console: Console,
        peak: float | None = None,
        board: Board | None = None,
    ):
        self.config, self.console, self.board = config, console, board
        self.file = open_metrics(path, first)
        self.samples = path and Path(path).with_name("samples.jsonl")
        self.said = -math.inf
        self.bar = Bar(console, first, config.steps) if console.is_terminal else None
        self.speed = Speed(config, first, peak)

    def log_train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Note that `step` is done; every `log_every` steps, and at the last, write its line.

        `metrics`: scalars `loss` (nats a token), `learning_rate`, `grad_norm`, `skipped` (updates
        up to now) and any others, on the device or not: they are fetched only for a line.
        """
        self.speed.note(step)
        if step % self.config.log_every and step != self.config.steps:
            if self.bar:
                self.bar.advance(step)
            return
        numbers = {name: np.asarray(value).item() for name, value in metrics.items()}
        tokens = step * self.config.batch_size * self.config.window
        line = {"step": step} | numbers | {"tokens": tokens} | self.speed.measure()
        self.write(line)
        self.show(step, line)

    def log_eval(self, step: int, val_loss: float, val_bits_per_byte: float) -> None:
        """Write and show what an evaluation on held-out text found, in nats a token and bits."""
        self.write(
            {
                "step": step,
                "val_loss": float(val_loss),
                "val_bits_per_byte": float(val_bits_per_byte),
            }
        )
        self.console.print(
            f"step {step:,}  validation loss {val_loss:.4f}, {val_bits_per_byte:.4f} bits a byte",
            soft_wrap=True,
        )

    def log_sample(self, step: int, text: str) -> None:
        """Keep what the model wrote at `step`, in samples.jsonl; what an earlier process wrote from
        there on goes. Where there is no room for it, as in `write`."""
        line = to_line({"step": step, "text": text}).encode()
        forgiven = (OSError,) if self.config.keep_going else ()
        with contextlib.suppress(*forgiven), open_metrics(self.samples, step - 1) as file:
            file.write(line)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line that is in the file before this returns: whole, or not at all.

        Where there is no room for it, OSError, or with `keep_going` it is left out.
        """
        line, end = to_line(record).encode(), self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(end)
            if not self.config.keep_going:
                raise OSError(error.errno, error.strerror, self.file.name) from None
        if self.board:
            self.board.add(record)

    def show(self, step: int, line: Mapping[str, Any]) -> None:
        """Progress: on the bar, or now and then as a line where there is no terminal."""
        speed = line["tokens_per_second"]
        left = (self.config.steps - step) * self.config.batch_size * self.config.window
        text = f"loss {line['loss']:.4f}  {speed:,.0f} tokens/s"
        text += f", MFU {line['mfu']:.0%}" if "mfu" in line else ""
        text += f"  {line['skipped']} skipped" if line["skipped"] else ""
        text += f"  {clock(left / speed)} left" if left and speed else ""
        now = time.perf_counter()
        if self.bar:
            self.bar.advance(step, text)
        elif now - self.said >= SECONDS_BETWEEN_LINES or not left:
            self.said = now
            self.console.print(f"step {step:,}/{self.config.steps:,}  {text}", soft_wrap=True)

    def close(self) -> None:
        """Take the bar from the screen and close the file."""
        if self.bar:
            self.bar.progress.stop()
        if self.board:
            self.board.close()
        if summary := self.speed.summary():
            self.console.print(summary)
        self.file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Bar:
    """A progress bar over the steps of the run, with a text of the latest numbers."""

    def __init__(self, console: Console, first: int, steps: int):
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.progress = Progress(*columns, console=console, refresh_per_second=4)
        self.task = self.progress.add_task("train", completed=first, total=steps, text="")
        self.progress.start()

    def advance(self, step: int, text: str | None = None) -> None:
        """Move to `step`; a text replaces the one that stands there."""
        self.progress.update(self.task, completed=step, **({} if text is None else {"text": text}))


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def draw_curves(path_metrics: str | Path, path_png: str | Path) -> None:
    """Draw the training and validation losses of a metrics.jsonl; nothing if it has none."""
    records = read_metrics(path_metrics)
    training, validation = curve(records, "loss"), curve(records, "val_loss")
    if not training[0] and not validation[0]:
        return
    from matplotlib.figure import Figure  # half a second that only this needs

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    draw_losses(axes, training, validation)
    aside = Path(path_png).with_suffix(".new")
    figure.savefig(aside, format="png")
    os.replace(aside, path_png)  # whole, or not at all


def curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was a number."""
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def draw_losses(axes: Any, training: tuple, validation: tuple) -> None:
    """Both curves on `axes`: each batch faint, their mean over it, validation on top."""
    blue, orange = "#3b6ea8", "#d9702f"
    axes.plot(*training, color=blue, alpha=0.3, linewidth=0.8)
    axes.plot(training[0], smoothed(training[1]), color=blue, linewidth=1.8, label="training")
    axes.plot(*validation, "o-", color=orange, linewidth=1.6, markersize=4, label="validation")
    axes.set(xlabel="optimizer steps", ylabel="loss, nats a token")
    axes.set_title(title_of(training, validation), loc="left", fontsize=11, pad=10)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.margins(x=0.01)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def title_of(training: tuple, validation: tuple) -> str:
    """The last loss, of the validation where there was one."""
    name, (steps, losses) = ("Validation", validation) if validation[0] else ("Training", training)
    return f"{name} loss {losses[-1]:.3f} after {steps[-1]:,} steps"


def smoothed(values: list[float]) -> list[float]:
    """The mean over a twentieth of `values` around each: narrower at the ends, so never late."""
    widest, last = len(values) // 40, len(values) - 1
    reach = [min(i, last - i, widest) for i in range(len(values))]
    return [statistics.fmean(values[i - n : i + n + 1]) for i, n in enumerate(reach)]
