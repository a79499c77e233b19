"""JSON from strangers: bounded, strict, and refused in one sentence. Knows no format."""

import json
from pathlib import Path
from typing import Any

from gpt.errors import UserError, require

MEGABYTE = 2**20
LONGEST = 32 * MEGABYTE  # of a vocabulary


def read(path: Path, most: int = MEGABYTE) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes; UserError if it is anything else."""
    return parse(read_bytes(path, most), str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """A file of at most `most` bytes; UserError if it is larger, or a pipe or device that never
    ends."""
    require(path.is_file(), f"{path} cannot be read: it is no file")
    try:
        size = path.stat().st_size
        require(
            size <= most, f"{path} has {size:,} bytes: expected at most {most:,}; is it damaged?"
        )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def parse(content: bytes, what: str) -> dict[str, Any]:
    """`content` as a JSON object without a name twice, NaN or bottomless nesting."""
    try:
        values = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant
        )
    except RecursionError:
        raise UserError(f"{what} is nested too deeply: it is damaged or hostile") from None
    except ValueError as error:  # bad UTF-8 too
        raise UserError(f"{what} is no JSON that can be read: {str(error)[:200]}") from None
    require(isinstance(values, dict), f"{what} holds no JSON object: it is damaged")
    return values


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these pairs; ValueError where a name stands twice."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {name[:60]!r} stands twice")
        values[name] = value
    return values


def refuse_constant(word: str) -> None:
    """ValueError for NaN and Infinity, which are no JSON."""
    raise ValueError(f"{word} is no number")
