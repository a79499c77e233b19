"""Whole characters out of a stream of tokens, up to the first stop string.

A byte-level token may end in the middle of a character; what is handed out never does. What may be
the beginning of a stop string is held back until it is known.
"""

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Decodes the tokens of one row as they come. `stopped`: one of `stops` has been met.

    `before`: the first bytes of a character that the first token may complete.
    """

    def __init__(
        self,
        decode_bytes: Callable[[Sequence[int]], bytes],
        stops: Sequence[str] = (),
        before: bytes = b"",
    ):
        self.decode_bytes = decode_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoder.decode(before)
        self.before = before
        self.stops = stops
        self.held = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The characters that `tokens` complete, none of a stop string nor after it."""
        return self.release(self.decoder.decode(self.decode_bytes(tokens)))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the model broke off within a character."""
        released = self.release(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return released

    def release(self, text: str) -> str:
        """`text` after what was held, but for a stop string or what may become one.

        Of several stop strings the first to end counts, and of those that end together the
        longest: so it does not matter in which pieces the text came.
        """
        if self.stopped:
            return ""
        text, self.held = self.held + text, ""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops]
        if met := [(end, start) for end, start in found if start >= 0]:
            self.stopped = True
            return text[: min(met)[1]]
        unsure = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - unsure :]
        return text[: len(text) - unsure]


def split_end(data: bytes) -> tuple[str, bytes]:
    """Bytes as text, U+FFFD for those that are none, and what may begin one more character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(data), decoder.getstate()[0]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
