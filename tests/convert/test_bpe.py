"""Lists of pairs against ranks: the proof that both give the same ids, and where there is none."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_bpe import by_list

from gpt.convert import bpe, pieces
from gpt.data import tokenizers
from gpt.errors import UserError

END = "<|endoftext|>"


def test_a_list_of_pairs_that_differs_on_some_text_is_seen():
    """bc joins before ab, so the list never makes abc of abc; ranks would."""
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    ranks = {bytes([b]): b for b in range(256)} | {
        a + b: 256 + i for i, (a, b) in enumerate(merges)
    }
    with pytest.raises(UserError, match="other halves"):
        bpe.require_same(merges, ranks, False)
    assert bpe.list_merges(ranks)[0][-1] == (b"a", b"bc")


@given(st.integers(0, 10**9))
def test_any_ranks_have_their_list(seed):
    """Random vocabularies: the list that we write is what tiktoken does with the ranks."""
    rng = random.Random(seed)
    tokens = [bytes([b]) for b in range(256)]
    letters = [b"a", b"b", b"c"]
    for _ in range(9):
        new = rng.choice(letters) + rng.choice(letters)
        if new not in tokens:
            tokens.append(new)
            letters.append(new)
    ranks = {token: i for i, token in enumerate(tokens)}
    try:
        merges, whole = bpe.list_merges(ranks)
    except UserError:
        return
    bpe.require_same(merges, ranks, whole)
    kept = tokenizers.build("t", pieces.GPT2, tokens, {END: len(tokens)})
    for length in (5, 8, 30):
        text = "".join(rng.choice("abc") for _ in range(length))
        taken = whole and text.encode() in ranks
        wanted = [ranks[text.encode()]] if taken else by_list(text, merges, ranks)
        assert kept.encode_ordinary(text) == wanted


def test_a_token_that_overlaps_itself_and_that_no_lower_ones_make():
    """As 21 of Llama 3's: the list has every pair that makes it up, and the ids are the same."""
    tokens = [b"ab", b"ba", b"baab", b"aba", b"abba", b"abbab"]
    ranks = {bytes([b]): b for b in range(256)} | {t: 256 + i for i, t in enumerate(tokens)}
    merges, whole = bpe.list_merges(ranks)
    assert whole and (b"abba", b"b") in merges
    with pytest.raises(UserError, match="is made by no pair"):
        bpe.require_same(merges, ranks, False)
    kept = tokenizers.build("t", pieces.GPT2, [*ranks], {END: len(ranks)})
    for letters in itertools.product("ab", repeat=9):
        text = "".join(letters)
        assert kept.encode_ordinary(text) == by_list(text, merges, ranks)
