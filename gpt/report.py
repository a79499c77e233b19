"""One self-contained page about runs: python -m gpt.report RUN [RUN ...] --out FILE.html

    python -m gpt.report runs/tiny --out report.html
    python -m gpt.report runs/a runs/b --out both.html --png pictures

Curves of all runs in one picture each, what they wrote as they learned, their settings and the
command that makes them again. A run may still be going.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from gpt import cli
from gpt.errors import require


@dataclass(frozen=True)
class Command:
    """Which runs to report on, and where to."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, as train.py made them."""
    out: Path | None = None
    """The HTML file to write."""
    png: Path | None = None
    """A folder for the pictures alone; it is made if need be."""


def main(argv: list[str]) -> None:
    """Read the runs, write what was asked for."""
    command = cli.parse(Command, argv, program="python -m gpt.report", description=__doc__)
    require(bool(command.runs), "no run given: expected one or more folders made by train.py")
    require(
        bool(command.out or command.png),
        "nothing to write: expected --out FILE.html, --png DIR or both",
    )
    cli.prepare_jax()
    from gpt.reports import chart, html, run_report
    from gpt.reports.runs import read_runs

    if command.out:
        html.require_place("--out", command.out)
    if command.png:
        html.require_folder("--png", command.png)
    runs = read_runs(command.runs)
    if command.out:
        html.write(command.out, run_report.build(runs, cli.interpreter()))
        print(f"report         {command.out} ({command.out.stat().st_size / 1e6:.2f} MB)")
    if command.png:
        command.png.mkdir(parents=True, exist_ok=True)
        names = [run.name for run in runs]
        for panel in run_report.panels(runs):
            print(f"picture        {chart.save_picture(panel, names, command.png)}")


if __name__ == "__main__":
    cli.run(main)
