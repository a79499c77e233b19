"""What a user can get wrong, told in one message. Knows nothing of the rest of the project."""

import math


class UserError(Exception):
    """The input was wrong: the message names the thing, what was expected and what to do.

    Entry points print it as one `error: ` line and leave with exit code 2, without a traceback.
    """


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
    require(0 <= value < math.inf, f"{name} is {value}: expected zero or more")


def fraction(name: str, value: float) -> None:
    """Raise UserError unless `value` is from 0 up to, not including, 1."""
    require(0 <= value < 1, f"{name} is {value}: expected 0 <= {name.split('.')[-1]} < 1")
