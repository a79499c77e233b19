"""Errors that are shown to the user as one line, and checks that raise them.

Knows nothing of the rest of the project.
"""

import math
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """The input was wrong: the message says what, what was expected and what to do.

    Entry points print it as one `error: ` line and leave with exit code 2, without a traceback.
    """


class Failed(Exception):
    """The input was right, but the work failed: a run diverged, for example.

    Entry points print it as one `error: ` line and leave with exit code 1, without a traceback.
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, NumPy or XLA reports by `error` that memory ran out."""
    from_xla = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")  # as older JAX says
    return isinstance(error, MemoryError) or (from_xla and "RESOURCE_EXHAUSTED" in str(error))


def one_line(error: Exception) -> str:
    """What a library says is wrong, on one line and not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def check_names(config: object, prefix: str = "") -> None:
    """Raise UserError unless each Literal field of a dataclass has one of its values."""
    for name, kind in get_type_hints(type(config)).items():
        kinds = (kind,) if get_origin(kind) is Literal else get_args(kind)
        if int in kinds and isinstance(getattr(config, name), int):
            continue
        names = [word for k in kinds if get_origin(k) is Literal for word in get_args(k)]
        value = getattr(config, name)
        good = not names or value in names or (value is None and type(None) in kinds)
        require(good, f"{prefix}{name} is {value!r}: expected one of {', '.join(names)}")


def check_numbers(config: object) -> None:
    """Raise UserError unless the int and float fields of a dataclass hold such numbers."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if kind is int:
            require(isinstance(value, Integral), f"{name} is {value!r}: expected an integer")
        if kind is float:
            require(isinstance(value, Real), f"{name} is {value!r}: expected a number")


def is_of(value: Any, kind: Any) -> bool:
    """Whether `value` is of type `kind`: a class, a Literal, or a union of these."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(is_of(value, one) for one in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def each(check: Callable[[str, Any], None], config: object, names: str, prefix: str = "") -> None:
    """Call `check` on the fields of a config listed in `names`, except those that are None.

    `names` is separated by spaces.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None:
            check(prefix + name, value)


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


def require_file_path(flag: str, path: Path) -> None:
    """Raise UserError unless `path`, given with `flag`, is in an existing folder and is not one."""
    folder = path.absolute().parent
    require(folder.is_dir(), f"{flag} {path}: folder {folder} does not exist; create it")
    require(not path.is_dir(), f"{flag} {path}: is a folder; give the name of a file in it")
