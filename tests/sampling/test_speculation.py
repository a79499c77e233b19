"""Proposals: which, how many, and what they bring. That they change no token: test_rows.py."""

import dataclasses
import string

import jax
import numpy as np
import pytest
from byte_models import CONFIG, make_model

from gpt.compile_log import compilations
from gpt.data.tokenizers import IdTokenizer
from gpt.errors import UserError
from gpt.model import int8
from gpt.sampling import generate, speculation
from gpt.sampling.completion import NO_TOKEN
from gpt.sampling.settings import Settings

# Prompt and new tokens fill a cache that need not grow: its programs are compiled once.
PROMPT = string.ascii_letters[:33]
SETTINGS = Settings(max_new_tokens=31, temperature=1, ignore_eos=True, speculate=4)


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


def test_a_draft_must_fit_the_model():
    model = make_model()
    with pytest.raises(UserError, match="the draft has another tokenizer: expected a model with"):
        model.with_draft(dataclasses.replace(model, tokenizer=IdTokenizer(257, 256)))
    short = make_model(dataclasses.replace(CONFIG, context_length=64))
    with pytest.raises(UserError, match="the draft has a context of 64 tokens: expected at least"):
        model.with_draft(short)


def test_a_draft_that_fails_rests():
    """It knows nothing of the model."""
    model = make_model(dataclasses.replace(CONFIG, n_layers=1))
    stranger = make_model(dataclasses.replace(CONFIG, n_layers=1, n_heads=1, d_model=8))
    plain = generate.complete(model, [PROMPT], dataclasses.replace(SETTINGS, speculate=0))[0]
    found = generate.complete(model.with_draft(stranger), [PROMPT], SETTINGS)[0]
    assert found.token_ids == plain.token_ids
    assert found.accepted < 0.2 * found.proposed
    assert found.proposed == 64  # those of the first 16 steps


def test_a_draft_that_is_the_model_is_always_right(monkeypatch):
    """Its cache follows what has been kept, so it draws what the model draws. The second time fewer
    of its proposals are allowed than it makes, and nothing compiles."""
    monkeypatch.setattr(speculation, "choose_n_proposals", lambda *_: 4)
    model = make_model(dataclasses.replace(CONFIG, n_layers=1))
    plain = generate.complete(model, [PROMPT], dataclasses.replace(SETTINGS, speculate=0))[0]
    for limit, n_accepted in ((4, 24), (2, 20)):  # of 30 tokens, 5 or 3 for each reading
        before = compilations.programs
        settings = dataclasses.replace(SETTINGS, speculate=limit)
        found = generate.complete(model.with_draft(model), [PROMPT], settings)[0]
        assert found.token_ids == plain.token_ids
        assert found.accepted == found.proposed == n_accepted
        assert limit == 4 or compilations.programs == before


def test_int8_weights_draw_the_same_text(monkeypatch):
    """Some proposals are right and some wrong."""
    monkeypatch.setattr(speculation, "choose_n_proposals", lambda *_: 4)
    model = make_model(dataclasses.replace(CONFIG, n_layers=1))
    model = dataclasses.replace(model, params=int8.quantize(model.params))
    plain = generate.complete(model, [PROMPT], dataclasses.replace(SETTINGS, speculate=0))[0]
    hint = [*PROMPT.encode(), *plain.token_ids]
    hint[40] ^= 1
    found = generate.complete(model, [PROMPT], SETTINGS, hints=[hint])[0]
    assert found.token_ids == plain.token_ids
    assert 12 < found.accepted < found.proposed


def test_a_text_foreseen_takes_fewer_steps_and_a_new_one_no_proposals(monkeypatch):
    """In steady state nothing compiles, whatever is proposed."""
    model = make_model(dataclasses.replace(CONFIG, n_layers=1))
    chunks, honest = [], speculation.speculate_chunk

    def counted(*args):
        chunks.append(args[-1].n_proposals)
        return honest(*args)

    monkeypatch.setattr(speculation, "speculate_chunk", counted)
    # Weights that are bound to a device, as loaded ones are.
    model = dataclasses.replace(model, params=jax.device_put(model.params, jax.devices()[0]))
    plain = generate.complete(model, [PROMPT], dataclasses.replace(SETTINGS, speculate=0))[0]
    assert (plain.proposed, plain.accepted) == (0, 0) and chunks == []

    hint = [*PROMPT.encode(), *plain.token_ids]
    for turn in range(2):
        before = compilations.programs
        foreseen = generate.complete(model, [PROMPT], SETTINGS, hints=[hint])[0]
        assert foreseen.token_ids == plain.token_ids
        assert foreseen.accepted == foreseen.proposed == 24  # of 30 tokens, 5 for each reading
        assert turn == 0 or compilations.programs == before
    assert chunks == [4, 4]
    new = generate.complete(model, [PROMPT], SETTINGS, hints=[range(len(hint))])[0]
    assert new.token_ids == plain.token_ids and new.proposed == 0
    assert chunks == [4, 4, 0, 0]
