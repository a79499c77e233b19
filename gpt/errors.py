"""What a user can get wrong, told in one message. Knows nothing of the rest of the project."""


class UserError(Exception):
    """The input was wrong: the message names the thing, what was expected and what to do.

    Entry points print it as one `error: ` line and leave with exit code 2, without a traceback.
    """


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)
