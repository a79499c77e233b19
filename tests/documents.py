"""The commands in README.md and docs/, and ways to try them."""

import importlib.util
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from unittest import mock

import programs
import pytest
import tyro

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {
    "gpt.bench": "gpt/bench/__main__",
    "gpt.convert": "gpt/convert/__main__",
    "gpt.report": "gpt/report",
    "gpt.tour": "gpt/tour",
}
# Placeholders for what a reader fills in.
PLACEHOLDERS = {"N": "1", "ID": "1", "VALUE": "1"}


def typed(path: Path) -> list[list[str]]:
    """The commands of a document, as words: in blocks, in indented lines, between backticks."""
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ {4}(\S.*?)(?: {2,}.*)?$", prose, re.MULTILINE)
    lines += re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)
    return in_blocks(path) + commands(lines)


def in_blocks(path: Path) -> list[list[str]]:
    """The commands of its blocks, which a reader copies one after the other; those of several lines
    end each but the last in a backslash."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return commands("\n".join(blocks).replace("\\\n", " ").splitlines())


def commands(lines: list[str]) -> list[list[str]]:
    """The words of those lines that are commands of ours."""
    found = [words_of(line) for line in lines]
    return [words for words in found if words]


def words_of(line: str) -> list[str]:
    """The words of a command from `train.py`, `sample.py`, `-m` or a script's path on, or from
    `make` on; none if the line is not one of our commands."""
    line = " ".join(line.split())
    found = re.match(r"(?:\$ |srun )?(?:\.venv/bin/)?python (.*)|((?:train|sample)\.py .*)", line)
    if not found:
        return shlex.split(line) if line.startswith("make ") else []
    words = shlex.split(found[1] or found[2], comments=True)
    words = [PLACEHOLDERS.get(word, word) for word in words]
    return [] if {"...", "[flags]"} & {*words} else words


def split(words: list[str]) -> tuple[str, list[str]]:
    """The program of a command, as `programs.call` names it, and its arguments."""
    if words[0] == "-m":
        return MODULES[words[1]], words[2:]
    return words[0].removesuffix(".py"), words[1:]


class Parsed(Exception):
    """Raised when a program has parsed its flags, to stop it there."""


def parse(words: list[str]) -> None:
    """Let the program of a command parse its arguments, and do nothing with them."""
    name, argv = split(words)
    parse_flags = tyro.cli

    def parse_and_stop(*args, **kwargs):
        parse_flags(*args, **kwargs)
        raise Parsed

    with (
        mock.patch.object(tyro, "cli", parse_and_stop),
        mock.patch.object(sys, "argv", words),
        redirect_stdout(StringIO()),
        pytest.raises((Parsed, SystemExit)) as stopped,
    ):
        call_main(name, argv)
    assert stopped.type is Parsed or stopped.value.code == 0  # --help exits with 0


def call_main(name: str, argv: list[str]) -> None:
    """Call a program's main, which takes `argv`, or a script's, which reads sys.argv."""
    main = program(name).main
    main(argv) if main.__code__.co_argcount else main()


@cache
def program(name: str):
    """An entry point or a script as a module."""
    if not name.startswith(("benchmarks/", "docs/")):
        return programs.program(name)
    spec = importlib.util.spec_from_file_location(Path(name).name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@cache
def flags(name: str, *before: str) -> set[str]:
    """All flags in a program's help, or in that of its subcommand `before`."""
    out, argv = StringIO(), [*before, "--help"]
    with (
        redirect_stdout(out),
        mock.patch.object(sys, "argv", [name, *argv]),
        pytest.raises(SystemExit),
    ):
        call_main(name, argv)
    return set(re.findall(r"--[a-z][a-z0-9.-]+", out.getvalue()))


def run(words: list[str], shrink: dict[str, list[str]]) -> programs.Done:
    """Run a command, with the flags that `shrink` has for its program appended."""
    name, argv = split(words)
    return programs.call(name, *argv, *shrink.get(name, ()))
