"""Errors shown to the user as one line, and checks that raise them.

Imports nothing else from this project.
"""

import math
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """The input was wrong: the message says what is wrong, what was expected and what to do.

    Entry points print it as one `error: ` line and exit with code 2, without a traceback.
    """


class Failed(Exception):
    """The input was right, but the work failed: a run diverged, for example.

    Entry points print it as one `error: ` line and exit with code 1, without a traceback.
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` is Python, NumPy or XLA running out of memory."""
    from_xla = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")  # the older name
    return isinstance(error, MemoryError) or (from_xla and "RESOURCE_EXHAUSTED" in str(error))


def one_line(error: Exception) -> str:
    """A library's error message, on one line and not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def positive(name: str, value: int) -> None:
    """Raise UserError unless `value` is at least 1."""
    require(value >= 1, f"{name} is {value}: expected at least 1")


def above_zero(name: str, value: float) -> None:
    """Raise UserError unless `value` is a finite number above zero."""
    require(0 < value < math.inf, f"{name} is {value}: expected a positive number")


def not_negative(name: str, value: float) -> None:
    """Raise UserError unless `value` is a finite number, zero or more."""
    require(0 <= value < math.inf, f"{name} is {value}: expected zero or more, and finite")


def fraction(name: str, value: float) -> None:
    """Raise UserError unless `value` is from 0 up to, not including, 1."""
    require(0 <= value < 1, f"{name} is {value}: expected 0 <= {name.split('.')[-1]} < 1")


def probability(name: str, value: float) -> None:
    """Raise UserError unless `value` is from 0 to 1."""
    require(0 <= value <= 1, f"{name} is {value}: expected a number from 0 to 1")


def require_file_path(flag: str, path: Path) -> None:
    """Raise UserError unless `path`, given with `flag`, can be a file in an existing folder."""
    folder = path.absolute().parent
    require(folder.is_dir(), f"{flag} {path}: folder {folder} does not exist; create it")
    require(not path.is_dir(), f"{flag} {path}: is a folder; give the name of a file in it")


# Field types that `check_fields` checks.
PositiveInt = Annotated[int, positive]
PositiveFloat = Annotated[float, above_zero]
NonNegativeInt = Annotated[int, not_negative]
NonNegativeFloat = Annotated[float, not_negative]
Fraction = Annotated[float, fraction]
Probability = Annotated[float, probability]
BOUNDS = (positive, above_zero, not_negative, fraction, probability)
TYPE_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "text"}
TYPE_NAMES |= {type(None): "None"}


def check_fields(config: object, prefix: str = "") -> None:
    """Raise UserError unless each field of a dataclass has a value of its type, within the bounds
    in its annotation; None has no bounds."""
    for name, annotated in get_type_hints(type(config), include_extras=True).items():
        kind, *notes = get_args(annotated) if get_origin(annotated) is Annotated else [annotated]
        value = getattr(config, name)
        is_right = is_of(value, kind)
        require(is_right, f"{prefix}{name} is {value!r}: expected {describe_type(kind)}")
        for check in BOUNDS:
            if check in notes and value is not None:
                check(prefix + name, value)


def is_of(value: Any, kind: Any) -> bool:
    """Whether `value` is of type `kind`: a class, a Literal, or a union of these. NumPy's numbers
    count as numbers, and integers as floats too. Dicts and tuples are not checked."""
    if get_origin(kind) in (dict, tuple):
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(is_of(value, one) for one in get_args(kind))
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def describe_type(kind: Any) -> str:
    """A class, a Literal, or a union of these, in words."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_args(kind):
        return " or ".join(map(describe_type, get_args(kind)))
    return TYPE_NAMES.get(kind, str(kind))
