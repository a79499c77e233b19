"""Turns a recording of a terminal into an SVG with its colors and boxes.

    script -qfc "python train.py" train.raw
    python docs/terminal.py train.raw --out docs/train.svg --command "python train.py" --lines 1-12

`script` (of util-linux) records everything that a program writes. The recording is played back,
so that a progress bar appears once, as it was at the end.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

CHUNK = re.compile(r"\r|\n|\x1b\[([\d;]*)([A-Za-z])|\x1b\[\?\d+[hl]|[^\r\n\x1b]+")
# Rich's SVG template, without the web font that it would load.
SHAPE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono",
 monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}"
 height="{terminal_height}"/></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})"
 clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g>
</g></svg>
"""
ANSI = [(27, 31, 36), (229, 96, 92), (103, 197, 135), (220, 184, 99), (106, 169, 247)]
ANSI += [(199, 143, 232), (85, 197, 197), (216, 222, 230)]
BRIGHT = [(98, 108, 120), *ANSI[1:7], (255, 255, 255)]
THEME = TerminalTheme((24, 28, 33), (216, 222, 230), ANSI, BRIGHT)


@dataclass(frozen=True)
class Command:
    """Which recording, and which lines of it."""

    recording: tyro.conf.Positional[Path]
    """What `script` wrote."""
    out: Path
    """The SVG to write."""
    command: str
    """The command that was typed, shown on the first line."""
    lines: str | None = None
    """Which lines to show, such as 1-11,36,47-50; gaps are marked (default: all)."""
    width: int = 100
    """Columns; longer lines are wrapped."""


def play(recording: str) -> list[str]:
    """The lines as they were at the end. Moving the cursor up, returning it to the line start
    and clearing a line are followed; other control sequences are ignored."""
    recording = re.sub(r"^Script (started|done).*\n?", "", recording, flags=re.MULTILINE)
    lines = [""]
    row = 0
    at_line_start = False  # after a carriage return: the next text replaces the line
    for match in CHUNK.finditer(recording):
        chunk, count, command = match[0], match[1], match[2]
        if chunk == "\n":
            row += 1
            at_line_start = False
            if row == len(lines):
                lines.append("")
        elif chunk == "\r":
            at_line_start = True
        elif command == "A":
            row = max(row - int(count or 1), 0)
        elif command == "K":
            lines[row] = ""
        elif command == "m" or not chunk.startswith("\x1b"):
            lines[row] = chunk if at_line_start else lines[row] + chunk
            at_line_start = False
    return lines


def choose(lines: list[str], wanted: str | None) -> list[str]:
    """The lines of `wanted`, ranges counted from 1 and both ends included, with a mark at gaps."""
    if wanted is None:
        return lines
    chosen = []
    for part in wanted.split(","):
        first, _, last = part.partition("-")
        if chosen:
            chosen.append("⋮")
        chosen += lines[int(first) - 1 : int(last or first)]
    return chosen


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    lines = play(command.recording.read_bytes().decode().replace("\r\n", "\n"))
    shown = Text.from_ansi("\n".join(choose(lines, command.lines)).rstrip())
    console = Console(record=True, width=command.width, file=io.StringIO())
    console.print(Text(f"$ {command.command}", style="bold"), shown, sep="\n", overflow="fold")
    svg = console.export_svg(title="", theme=THEME, code_format=SHAPE, unique_id="terminal")
    command.out.write_text(svg, encoding="utf-8")
    print(command.out)


if __name__ == "__main__":
    main()
