"""Stop strings and whole characters, whatever the pieces the text comes in."""

import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt.sampling.completion import TextStream

letters = st.text("ab今", max_size=12)
stops = st.lists(st.text("ab今", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that ends first, and of those the one that begins first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def pieces(data: bytes, rng: random.Random):
    """The bytes in random portions."""
    while data:
        n = rng.randint(1, 4)
        yield data[:n]
        data = data[n:]


@settings(max_examples=200)
@given(letters, stops, st.randoms(use_true_random=False))
@example("abab", ["abab", "b"], random.Random(0))  # the one that begins first ends last
def test_any_pieces_give_the_text_before_the_first_stop_string(text, stops, rng):
    stream = TextStream(bytes, stops)
    told = []
    for piece in pieces(text.encode(), rng):
        told.append(stream.push(piece))
        assert "\ufffd" not in told[-1]
        if stream.stopped:
            break
    assert stream.stopped == (cut(text, stops) != text)
    assert "".join(told) + stream.finish() == cut(text, stops)


@settings(max_examples=100)
@given(letters, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_nothing_is_held_back_without_a_reason(text, stops):
    """What has not been told is the beginning of a stop string."""
    stream = TextStream(bytes, stops)
    told = stream.push(text.encode())
    if not stream.stopped:
        held = text[len(told) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_character_is_shown_when_it_is_whole_and_a_broken_one_at_the_end():
    stream = TextStream(bytes)
    pushed = [stream.push(bytes([b])) for b in "天今".encode()[:5]]
    assert pushed == ["", "", "天", "", ""] and stream.finish() == "\ufffd"
