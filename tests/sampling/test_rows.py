"""Rows are independent, and speculation changes nothing: over many random batches of a few compiled
shapes."""

import dataclasses

import jax
import numpy as np
import pytest
from byte_models import make_model

from gpt.compile_log import compilations
from gpt.config import ModelConfig
from gpt.sampling import generate, speculation
from gpt.sampling.settings import Settings

pytestmark = pytest.mark.exact

# The context is the smallest bucket: every batch of B rows has one shape, slid or not.
CONFIG = ModelConfig(257, context_length=32, n_layers=2, n_heads=2, n_kv_heads=1, d_model=16)
B = 4


def random_settings(rng) -> Settings:
    """Anything a row may be asked for."""

    def one_of(*values):
        return values[rng.integers(len(values))]

    biases = {int(token): float(rng.normal(0, 3)) for token in rng.integers(257, size=3)}
    return Settings(
        max_new_tokens=int(rng.integers(1, 13)),
        logit_bias=one_of({}, {}, biases),
        repetition_penalty=one_of(1.0, 1.0, 1.3, 0.8),
        ignore_eos=bool(rng.random() < 0.5),
        temperature=one_of(0.0, 0.5, 1.0, 1.7),
        top_k=one_of(0, 0, 1, 7),
        top_p=one_of(1.0, 1.0, 0.9, 0.3, 0.0),
        min_p=one_of(0.0, 0.0, 0.05, 1.0),
        stop=one_of((), ("e",), ("ab", "\n")),
        on_context_full=one_of("stop", "slide"),
        seed=int(rng.integers(5)),
    )


def random_row(rng) -> tuple[list[int], Settings]:
    """A prompt of any length that fits, and settings."""
    ids = rng.integers(256, size=rng.integers(1, CONFIG.context_length + 1)).tolist()
    return ids, random_settings(rng)


def run(model, rows) -> list[tuple]:
    """What each (prompt, settings) draws when they are completed together."""
    done = generate.complete(model, *zip(*rows, strict=True))
    return [(c.token_ids, c.logprobs, c.finish_reason, c.text) for c in done]


def same_alone(alone: tuple, together: tuple, allowed: float) -> bool:
    """Whether the tokens are equal; their log-probabilities must be close up to where they part."""
    for token, other, p, q in zip(*alone[:1], *together[:1], alone[1], together[1], strict=False):
        if token != other:
            return False
        assert abs(p - q) <= allowed
    return alone[2:] == together[2:]


@pytest.mark.parametrize("n_batches", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_rows_do_not_see_each_other_in_random_batches(n_batches):
    """Within a shape to the bit: in another place, beside other rows. Alone, another shape, within
    rounding; where the draw lies within it, at most one row in a thousand may differ."""
    model = make_model(CONFIG)
    allowed = 4e-5 * max(1, float(model.logits("a text").std()))
    exempt = 0
    for number in range(n_batches):
        rng = np.random.default_rng(number)
        rows, stranger = [random_row(rng) for _ in range(B)], random_row(rng)
        together = run(model, rows)
        place, out = rng.permutation(B), int(rng.integers(B))
        others = run(model, [stranger if i == out else rows[i] for i in place])
        for at, i in enumerate(place):
            assert i == out or others[at] == together[i], f"batch {number}, row {i}"
        for row, drawn in zip(rows, together, strict=True):
            exempt += not same_alone(run(model, [row])[0], drawn, allowed)
    assert exempt <= max(1, n_batches * B // 1000)


@pytest.mark.parametrize(
    ("n_batches", "has_draft", "share_proposing"),
    [
        (10, False, 0.8),
        (3, True, 1.0),
        pytest.param(300, False, 0.8, marks=pytest.mark.slow),
        pytest.param(300, True, 0.8, marks=pytest.mark.slow),
    ],
)
def test_speculation_changes_nothing_in_random_batches(
    n_batches, has_draft, share_proposing, monkeypatch
):
    """Proposals are what plain decoding gave, with errors in them, or those of a draft, which is
    the model with noise on its weights: all, some or none of those of a step are right. This share
    of the chunks proposes; the program of these and that of the others are compiled once."""
    model = make_model(CONFIG)
    noise = np.random.default_rng(0)
    drafted = model.with_draft(
        dataclasses.replace(
            model,
            params=jax.tree.map(
                lambda a: a + 0.03 * a.std() * noise.standard_normal(a.shape, np.float32),
                model.params,
            ),
        )
    )
    monkeypatch.setattr(speculation, "proposals_pay", lambda *_: True)
    allowed = 4e-5 * max(1, float(model.logits("a text").std()))
    n_proposed = n_accepted = n_exempt = 0
    n_compiled = len(compilations.each)
    for number in range(n_batches):
        rng = np.random.default_rng(number)
        rows = [random_row(rng) for _ in range(B)]
        plain = run(model, rows)

        hints = []
        for (prompt, _), (tokens, *_) in zip(rows, plain, strict=True):
            hint = np.array(prompt + tokens)
            is_wrong = rng.random(len(hint)) < 0.1
            hints.append(np.where(is_wrong, rng.integers(257, size=len(hint)), hint).tolist())

        hints[0] += [256] * (45 - len(hints[0]))  # one length: one program
        monkeypatch.setattr(
            speculation,
            "choose_n_proposals",
            lambda *_, rng=rng: 3 * int(rng.random() < share_proposing),
        )
        limits = [3, *rng.integers(4, size=B - 1).tolist()]
        settings = [
            dataclasses.replace(one, speculate=limit)
            for (_, one), limit in zip(rows, limits, strict=True)
        ]
        prompts = [prompt for prompt, _ in rows]
        proposer = drafted if has_draft else model
        found = generate.complete(proposer, prompts, settings, chunk=3, hints=hints)
        for c, expected in zip(found, plain, strict=True):
            drawn = (c.token_ids, c.logprobs, c.finish_reason, c.text)
            n_exempt += not same_alone(drawn, expected, allowed)
            n_proposed += c.proposed
            n_accepted += c.accepted
    assert 0.3 * n_proposed < n_accepted < 0.8 * n_proposed
    compiled = [program.name for program in compilations.each[n_compiled:]]
    assert compiled.count("speculate_chunk") == (1 if has_draft else 2)  # a draft that rests: none
    assert n_exempt <= max(1, n_batches * B // 1000)
