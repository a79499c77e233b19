"""Tokenizing progress: a bar on a terminal, else a line every half minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich import filesize
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def tokenizing_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many bytes of the files are tokenized, out of a total."""
    bar = Progress(
        *Progress.get_default_columns(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("tokenizing", total=None)
    start = last_line = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last_line
        if console.is_terminal:
            bar.start()  # only now, so that no empty bar is shown
            bar.update(task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES and done:
            last_line = now
            left = timedelta(seconds=round((now - start) * (total - done) / done))
            console.print(
                f"tokenizing     {filesize.decimal(done)} of {filesize.decimal(total)}, {left} left"
            )

    try:
        yield report
    finally:
        bar.stop()
