"""One self-contained page about runs: python -m gpt.report RUN [RUN ...] --out FILE.html

    python -m gpt.report runs/tiny --out report.html
    python -m gpt.report runs/a runs/b --out both.html --png pictures

The curves of all runs in the same pictures, the samples they wrote, their settings, and the command
that repeats each of them. A run may still be training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt import cli
from gpt.config import optional
from gpt.errors import require, require_file_path


@dataclass(frozen=True)
class Command:
    """Which runs to report on, and where to write it."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, as train.py made them."""
    out: Annotated[Path | None, optional("FILE")] = None
    """The HTML file to write."""
    png: Annotated[Path | None, optional("DIR")] = None
    """A folder for the charts as PNG files; it is made if need be."""


def main(argv: list[str]) -> None:
    command = cli.parse(Command, argv, program="python -m gpt.report", description=__doc__)
    require(bool(command.runs), "no run given: expected one or more folders made by train.py")
    require(
        bool(command.out or command.png),
        "nothing to write: expected --out FILE.html, --png DIR or both",
    )
    cli.prepare_jax()
    from gpt.reports import html, run_report

    if command.out:
        require_file_path("--out", command.out)
    if command.png:
        html.require_folder_path("--png", command.png)
    runs = run_report.read_runs(command.runs)
    if command.out:
        html.write(command.out, run_report.build_report(runs, cli.interpreter()))
        print(f"report         {command.out} ({command.out.stat().st_size / 1e6:.2f} MB)")
    if command.png:
        for path in run_report.save_pngs(runs, command.png):
            print(f"picture        {path}")


if __name__ == "__main__":
    cli.run(main)
