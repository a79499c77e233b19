"""The commands that README.md and docs/ tell people to type, and ways to try them."""

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
# Words that stand for what a reader fills in.
FILLED = {"N": "1", "ID": "1", "VALUE": "1"}


def typed(path: Path) -> list[list[str]]:
    """Every command of a document as words: in blocks, in indented lines, between backticks."""
    text = path.read_text(encoding="utf-8")
    return [words for line in lines_of(text) if (words := words_of(line))]


def in_blocks(path: Path) -> list[list[str]]:
    """The commands of its blocks alone: a reader copies these one after the other."""
    text = path.read_text(encoding="utf-8")
    return [words for line in block_lines(text) if (words := words_of(line))]


def lines_of(text: str) -> list[str]:
    """What may be a command: lines of blocks, of indented blocks, inline code."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4}(\S.*?)(?: {2,}.*)?$", prose, re.MULTILINE)
    return block_lines(text) + indented + re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)


def block_lines(text: str) -> list[str]:
    """Lines of the blocks that name no language, those that a backslash ends joined."""
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def words_of(line: str) -> list[str]:
    """A line as words from `train.py`, `sample.py`, `-m`, or a script's path on; of `make`, its
    targets too. Nothing where it is no command of ours."""
    line = " ".join(line.split())
    found = re.match(r"(?:\$ |srun )?(?:\.venv/bin/)?python (.*)|((?:train|sample)\.py .*)", line)
    if not found:
        return shlex.split(line) if line.startswith("make ") else []
    words = shlex.split(found[1] or found[2], comments=True)
    words = [FILLED.get(word, word) for word in words]
    return [] if {"...", "[flags]"} & {*words} else words


def split(words: list[str]) -> tuple[str, list[str]]:
    """The program of a command, as `programs.call` names it, and its arguments."""
    if words[0] == "-m":
        return MODULES[words[1]], words[2:]
    return words[0].removesuffix(".py"), words[1:]


class Parsed(Exception):
    """Raised where a program has read its flags."""


def parse(words: list[str]) -> None:
    """Let the program of a command read its arguments, and do nothing with them."""
    name, argv = split(words)
    read = tyro.cli

    def stop(*args, **kwargs):
        found = read(*args, **kwargs)
        if "registry" in kwargs:  # train.py looks ahead for its preset
            return found
        raise Parsed

    with (
        mock.patch.object(tyro, "cli", stop),
        mock.patch.object(sys, "argv", words),
        redirect_stdout(StringIO()),
        pytest.raises((Parsed, SystemExit)) as left,
    ):
        enter(name, argv)
    assert left.type is Parsed or left.value.code == 0  # of --help


def enter(name: str, argv: list[str]) -> None:
    """Call a program's main; a script's reads sys.argv."""
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
    """All flags in a program's help, of the subcommand `before` it if it has some."""
    out, argv = StringIO(), [*before, "--help"]
    with (
        redirect_stdout(out),
        mock.patch.object(sys, "argv", [name, *argv]),
        pytest.raises(SystemExit),
    ):
        enter(name, argv)
    return set(re.findall(r"--[a-z][a-z0-9.-]+", out.getvalue()))


def run(words: list[str], shrink: dict[str, list[str]]) -> programs.Done:
    """Run a command, with the flags after it that `shrink` has for its program."""
    name, argv = split(words)
    return programs.call(name, *argv, *shrink.get(name, ()))
