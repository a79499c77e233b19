"""A panic of tiktoken's Rust as an error of the user's. Knows nothing of tokenizers."""

import contextlib
from collections.abc import Iterator

from gpt.errors import UserError


@contextlib.contextmanager
def told() -> Iterator[None]:
    """UserError for a text in which a pattern has too many ways to be tried, where Rust panics."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception, and its class cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"the tokenizer's pattern cannot cut this text into pieces ({error}): give another "
            "text, or use another tokenizer"
        ) from None
