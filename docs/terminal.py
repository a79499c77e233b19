"""Draws what a terminal showed as an SVG: colours and boxes as they were, nothing made up.

    script -qfc "python train.py" train.raw
    python docs/terminal.py train.raw --out docs/train.svg --command "python train.py" --lines 1-12

`script` (of util-linux) records all that a program writes. The recording is played back here, so
that a progress bar is drawn once, as it stood last.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PLAY = re.compile(r"\r|\n|\x1b\[([\d;]*)([A-Za-z])|\x1b\[\?\d+[hl]|[^\r\n\x1b]+")
# Rich's picture of a window, without the font that it would fetch from elsewhere.
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
    """What to draw."""

    recording: tyro.conf.Positional[Path]
    """What `script` wrote."""
    out: Path
    """The SVG to write."""
    command: str
    """What was typed, for the first line."""
    lines: str | None = None
    """Which lines to draw, such as 1-11,36,47-50; a gap is shown as one (default: all)."""
    width: int = 100
    """Columns; what is longer goes on in the next line."""


def play(recording: str) -> list[str]:
    """The lines as they stood at the end: what moves the cursor up or clears a line is obeyed."""
    recording = re.sub(r"^Script (started|done).*\n?", "", recording, flags=re.MULTILINE)
    lines, row, fresh = [""], 0, False
    for found in PLAY.finditer(recording):
        piece, count, verb = found[0], found[1], found[2]
        if piece == "\n":
            row, fresh = row + 1, False
            lines += [""] * (row == len(lines))
        elif piece == "\r":
            fresh = True
        elif verb == "A":
            row = max(row - int(count or 1), 0)
        elif verb == "K":
            lines[row] = ""
        elif verb == "m" or not piece.startswith("\x1b"):
            lines[row], fresh = piece if fresh else lines[row] + piece, False
    return lines


def choose(lines: list[str], wanted: str | None) -> list[str]:
    """The lines of `wanted`, first and last counted from 1, with a mark at each gap."""
    if wanted is None:
        return lines
    parts = [[int(n) for n in part.split("-")] for part in wanted.split(",")]
    chosen = [lines[part[0] - 1 : part[-1]] for part in parts]
    return [line for i, part in enumerate(chosen) for line in ["⋮"] * (i > 0) + part]


def main() -> None:
    """Play the recording, draw the lines that were asked for."""
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
