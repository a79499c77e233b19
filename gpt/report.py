"""Write a self-contained page about runs: python -m gpt.report RUN [RUN ...]

    python -m gpt.report runs/tiny
    python -m gpt.report runs/a runs/b --out both.html

It plots the curves of all runs together and shows their samples and settings. A run may still be
training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import filesize

from gpt import cli
from gpt.config import optional
from gpt.errors import require, require_file_path


@dataclass(frozen=True)
class Command:
    """Which runs to report on, and where to write the report."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN ...", help_behavior_hint=""),
    ]
    """Run folders made by train.py."""
    out: Annotated[Path | None, optional("FILE", "report.html in the folder of the run")] = None
    """The HTML file to write."""


def main(argv: list[str]) -> None:
    command = cli.parse(Command, argv, program="python -m gpt.report", description=__doc__)
    require(bool(command.runs), "no run given: expected one or more folders made by train.py")
    require(
        len(command.runs) == 1 or command.out is not None,
        "a report on several runs needs its own file: add --out FILE",
    )
    out = command.out or command.runs[0] / "report.html"
    if command.out:
        require_file_path("--out", out)
    cli.prepare_jax()
    from gpt.reports import run_report

    page = run_report.build_report(run_report.read_runs(command.runs))
    out.write_text(page, encoding="utf-8", errors="replace")
    print(f"report         {out} ({filesize.decimal(out.stat().st_size)})")


if __name__ == "__main__":
    cli.run(main)
