"""Whole characters out of a stream of tokens.

A byte-level token may end in the middle of a character; what is handed out never does.
"""

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Decodes the tokens of one row as they come."""

    def __init__(self, decode_bytes: Callable[[Sequence[int]], bytes]):
        self.decode_bytes = decode_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        """The characters that `tokens` complete; bytes of an unfinished one are held back."""
        return self.decoder.decode(self.decode_bytes(tokens))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the model broke off within a character."""
        return self.decoder.decode(b"", final=True)
