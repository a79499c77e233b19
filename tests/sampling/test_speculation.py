"""Proposals: which, how many, and what they bring. That they change no token: test_rows.py."""

import dataclasses

import numpy as np
import pytest
from byte_models import CONFIG, make_model

from gpt.compile_log import compilations
from gpt.sampling import generate, speculation
from gpt.sampling.completion import NO_TOKEN
from gpt.sampling.settings import Settings


@pytest.mark.parametrize(
    ("text", "proposed"),
    [
        ("abcdefXabc", "def"),
        ("abcdXbceYabc", "dXb"),  # the longest match, though a shorter one is later
        ("abXabYab", "Yab"),  # of equal ones the latest
        ("XYabcab", "cab"),  # goes on in the same period
        ("aaaa", "aaa"),
        ("abcdef", None),  # the last token is new
        ("a", None),
    ],
)
def test_what_followed_the_end_before_is_proposed(text, proposed):
    text_BR = np.full((1, 12), NO_TOKEN, np.int32)
    text_BR[0, 12 - len(text) :] = list(text.encode())
    expected = [NO_TOKEN] * 3 if proposed is None else list(proposed.encode())
    assert speculation.look_up(text_BR, 3)[0].tolist() == expected


def test_proposals_are_read_where_they_pay():
    def choose(limits, agreement):
        return speculation.choose_n_proposals(np.array(limits), np.array(agreement))

    assert choose([4], [0.9]) == 4
    assert choose([4], [0.2]) == 0
    assert choose([4, 4], [0.9, 0.9]) == 4
    assert choose([4, 4], [0.6, 0.0]) == 0 < choose([4], [0.6])  # both would wait
    assert choose([4, 0], [0.9, 0.0]) == 4  # the other has ended
    assert choose([0, 0], [0.9, 0.9]) == 0
    # A CPU computes longer for more rows, an accelerator waits for the weights all the same.
    assert choose([4] * 16, [0.7] * 16) == 0


def test_a_text_foreseen_takes_fewer_steps_and_a_new_one_no_proposals(monkeypatch):
    """In steady state nothing compiles, whatever is proposed."""
    model = make_model(dataclasses.replace(CONFIG, n_layers=1))
    chunks, honest = [], speculation.speculate_chunk

    def counted(*args):
        chunks.append(args[-1].n_proposals)
        return honest(*args)

    monkeypatch.setattr(speculation, "speculate_chunk", counted)
    settings = Settings(max_new_tokens=17, temperature=1, ignore_eos=True, speculate=4)
    prompt = "sixteen letters."
    plain = generate.complete(model, [prompt], dataclasses.replace(settings, speculate=0))[0]
    assert (plain.proposed, plain.accepted) == (0, 0) and chunks == []

    hint = [*prompt.encode(), *plain.token_ids]
    for turn in range(2):
        before = compilations.programs
        foreseen = generate.complete(model, [prompt], settings, hints=[hint])[0]
        assert foreseen.token_ids == plain.token_ids
        assert foreseen.accepted == 13  # of 16 tokens: 5, 5, 5 and 1, whose proposals are too many
        assert turn == 0 or compilations.programs == before
    assert chunks == [4, 4]
    new = generate.complete(model, [prompt], settings, hints=[range(len(hint))])[0]
    assert new.token_ids == plain.token_ids and new.proposed == 0
    assert chunks == [4, 4, 0]
