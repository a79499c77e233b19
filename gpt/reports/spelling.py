"""Tokens as people read them: text where they are text, bytes where they are half a character."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpt.terminal import visible

SEEN = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})  # blanks that would not show


@dataclass(frozen=True)
class Spelled:
    """A token. `text`: what it shows as; `half`: it is no whole character, and shows as bytes.

    `whole`: of half characters, what they make together with their neighbours.
    """

    text: str
    half: bool = False
    whole: str = ""


def spell(token: bytes) -> Spelled:
    """A token by itself."""
    try:
        return Spelled(visible(token.decode().translate(SEEN)))
    except UnicodeDecodeError:
        return Spelled(visible(token.decode("utf-8", "backslashreplace").translate(SEEN)), True)


def spell_all(ids: Sequence[int], decode_bytes: Callable[[Sequence[int]], bytes]) -> list[Spelled]:
    """The tokens of a text, those that are half a character with what they make together."""
    tokens = [decode_bytes([token]) for token in ids]
    spelled, start = [spell(token) for token in tokens], 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i, token in enumerate(tokens):
        whole = decoder.decode(token)
        if decoder.getstate()[0]:  # bytes that wait for the rest of their character
            continue
        for j in range(start, i + 1):
            if spelled[j].half and "�" not in whole:
                together = b"".join(tokens[start : i + 1]).decode("utf-8", "replace")
                spelled[j] = Spelled(spelled[j].text, True, visible(together.translate(SEEN)))
        start = i + 1
    return spelled
