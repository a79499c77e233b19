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
from gpt.sampling import decode_loop, generate, sampler, speculation
from gpt.sampling.completion import NO_TOKEN
from gpt.sampling.settings import Settings

# Prompt and new tokens fill a cache that need not grow: its programs are compiled once.
PROMPT = string.ascii_letters[:33]
SETTINGS = Settings(max_new_tokens=31, temperature=1, ignore_eos=True, speculate=4)


@pytest.fixture(scope="module")
def model():
    """Its weights are bound to a device, as loaded ones are."""
    made = make_model(dataclasses.replace(CONFIG, n_layers=1))
    return dataclasses.replace(made, params=jax.device_put(made.params, jax.devices()[0]))


def complete(model, **options):
    return generate.complete(model, [PROMPT], SETTINGS, **options)[0]


def complete_plainly(model):
    plain = dataclasses.replace(SETTINGS, speculate=0)
    return generate.complete(model, [PROMPT], plain)[0]


def hint_of(completion):
    """The whole text, as if it had been foreseen."""
    return [*PROMPT.encode(), *completion.token_ids]


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
    with pytest.raises(UserError, match="the draft has a different tokenizer: expected"):
        model.with_draft(dataclasses.replace(model, tokenizer=IdTokenizer(257, 256)))
    short = make_model(dataclasses.replace(CONFIG, context_length=64))
    with pytest.raises(UserError, match="the draft has a context of 64 tokens: expected at least"):
        model.with_draft(short)


def test_a_draft_that_fails_rests(model):
    """It knows nothing of the model."""
    stranger = make_model(dataclasses.replace(CONFIG, n_layers=1, n_heads=1, d_model=8))
    found = complete(model.with_draft(stranger))
    assert found.token_ids == complete_plainly(model).token_ids
    assert found.accepted < 0.2 * found.proposed
    assert found.proposed == 28  # those of 7 steps: the chunk of 16 ends when they no longer pay


def test_a_draft_that_is_the_model_is_always_right(model, monkeypatch):
    """Its cache follows what has been kept, so it draws what the model draws. The second time fewer
    of its proposals are allowed than it makes, and nothing compiles."""
    monkeypatch.setattr(speculation, "choose_n_proposals", lambda *_: 4)
    monkeypatch.setattr(speculation, "proposals_pay", lambda *_: True)
    plain = complete_plainly(model)
    for limit, n_accepted in ((4, 24), (2, 20)):  # of 30 tokens, 5 or 3 for each reading
        before = compilations.programs
        settings = dataclasses.replace(SETTINGS, speculate=limit)
        found = generate.complete(model.with_draft(model), [PROMPT], settings)[0]
        assert found.token_ids == plain.token_ids
        assert found.accepted == found.proposed == n_accepted
        assert limit == 4 or compilations.programs == before


def test_a_chunk_of_an_accelerator_has_as_many_tokens_whatever_is_proposed(
    model, watch, monkeypatch
):
    """It takes all steps of a chunk, so those must not be many more than the text needs."""
    plain = complete_plainly(model)
    for module in (sampler, decode_loop, speculation, generate):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    chunks = watch(speculation, "speculate_chunk")
    foreseen = complete(model, hints=[hint_of(plain)])
    assert foreseen.token_ids == plain.token_ids and foreseen.accepted == 24
    assert [(args[-1].n_proposals, args[-1].size) for args in chunks] == [(4, 12)]


def test_a_small_draft_costs_an_accelerator_its_layers(model, monkeypatch):
    """Its weights are few, but each of its kernels takes as long to launch as the model's."""
    draft = dataclasses.replace(CONFIG, n_layers=1, n_heads=1, d_model=8)
    on_cpu = speculation.cost_of_draft(draft, CONFIG)
    monkeypatch.setattr(speculation, "platform", lambda: "gpu")
    assert on_cpu < 0.2 < speculation.cost_of_draft(draft, CONFIG) == 1 / CONFIG.n_layers


def test_a_text_foreseen_takes_fewer_steps_and_a_new_one_no_proposals(model, watch):
    """In steady state nothing compiles, whatever is proposed."""
    chunks = watch(speculation, "speculate_chunk")
    plain = complete_plainly(model)
    assert (plain.proposed, plain.accepted) == (0, 0) and chunks == []

    hint = hint_of(plain)
    for turn in range(2):
        before = compilations.programs
        foreseen = complete(model, hints=[hint])
        assert foreseen.token_ids == plain.token_ids
        assert foreseen.accepted == foreseen.proposed == 24  # of 30 tokens, 5 for each reading
        assert turn == 0 or compilations.programs == before
    new = complete(model, hints=[range(len(hint))])
    assert new.token_ids == plain.token_ids and new.proposed == 0
    assert [args[-1].n_proposals for args in chunks] == [4, 4, 0, 0]
