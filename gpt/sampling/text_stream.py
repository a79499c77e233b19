"""Whole characters from a stream of tokens, up to the first stop string.

A byte-level token may end in the middle of a character; the text that is handed out never does.
What may be the beginning of a stop string is held back until it is clear whether it is one.
"""

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Decodes the tokens of one row as they come. `stopped`: one of `stops` has been reached.

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
        """The characters that `tokens` complete, without a stop string and what follows it."""
        return self.release(self.decoder.decode(self.decode_bytes(tokens)))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the model stopped in the middle of a character."""
        released = self.release(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return released

    def release(self, text: str) -> str:
        """`text` after what was held back, without a stop string or what may become one.

        Of several stop strings the one that ends first counts, and of those that end together the
        longest, so that it does not matter in which pieces the text came.
        """
        if self.stopped:
            return ""
        text, self.held = self.held + text, ""
        matches = []  # (end, start)
        for stop in self.stops:
            start = text.find(stop)
            if start >= 0:
                matches.append((start + len(stop), start))
        if matches:
            self.stopped = True
            _, start = min(matches)
            return text[:start]
        unsure = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - unsure :]
        return text[: len(text) - unsure]


def split_end(data: bytes) -> tuple[str, bytes]:
    """Bytes as text, with U+FFFD for invalid UTF-8, and the bytes of an unfinished character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(data), decoder.getstate()[0]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
