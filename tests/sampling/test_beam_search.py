"""Beam search against greedy decoding, exhaustive search and a plain search over lists."""

import dataclasses
import functools
import math

import byte_models
import jax
import numpy as np
import pytest

from gpt.compile_log import compilations
from gpt.config import ModelConfig
from gpt.data.tokenizers import CharTokenizer
from gpt.errors import UserError
from gpt.model import transformer
from gpt.sampling import beam_search, generate
from gpt.sampling.beam_search import BeamSettings, search
from gpt.sampling.settings import Settings

# Four letters and end-of-text.
CONFIG = ModelConfig(5, context_length=48, n_layers=1, n_heads=2, d_model=16)
PROMPTS = ["ab", "", "dacbd" * 5, "c" * 30, "c" * 47, "b" * 48]
EOT = 4


make_model = functools.partial(byte_models.make_model, CONFIG, tokenizer=CharTokenizer("abcd"))
MODEL = make_model(seed=1)
forward = jax.jit(transformer.forward, static_argnums=0)


def logits_after(model, texts):
    """Logits after each text, from one full pass without a cache."""
    tokens = np.zeros((len(texts), CONFIG.context_length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    logits = np.asarray(forward(CONFIG, model.params, tokens), np.float64)
    return logits[np.arange(len(texts)), [len(text) - 1 for text in texts]]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def search_lists(model, prompt, s: BeamSettings):
    """The same search over plain lists; it runs to the very end if it "never" stops early."""
    ids = model.tokenizer.encode_ordinary(prompt) or [EOT]
    most = min(s.max_new_tokens, CONFIG.context_length + 1 - len(ids))
    live, ended = [(0.0, [])], []
    for length in range(1, most + 1):
        texts = [ids + text for _, text in live]
        logits = logits_after(model, texts + [[EOT]] * (s.width - len(live)))[: len(live)]
        for row, text in zip(logits, texts, strict=True):
            for token, bias in s.logit_bias.items():
                row[token] += bias
            row[EOT] = -1e30 if s.ignore_eos else row[EOT]
            seen = sorted(set(text))
            up, down = row[seen] / s.repetition_penalty, row[seen] * s.repetition_penalty
            row[seen] = np.where(row[seen] > 0, up, down)
        ways = [
            (total + row[token], [*text, token])
            for (total, text), row in zip(live, log_softmax(logits), strict=True)
            for token in range(CONFIG.vocab_size)
            if row[token] > -1e20
        ]
        ways = sorted(ways, key=lambda way: -way[0])[: 2 * s.width]
        ends = [way for way in ways[: s.width] if way[1][-1] == EOT or length == most]
        ended += [(total / length**s.length_penalty, text) for total, text in ends]
        ended = sorted(ended, key=lambda way: -way[0])[: s.width]
        live = [way for way in ways if way[1][-1] != EOT][: s.width]
        if len(ended) == s.width:
            best = live[0][0] / length**s.length_penalty if live else -math.inf
            if s.early_stopping is True or (not s.early_stopping and best <= ended[-1][0]):
                break
    return ended[: s.n_best]


def whole(one):
    """The token ids of a result, its end-of-text included."""
    return one.token_ids + [EOT] * (one.finish_reason == "eos")


def same(found, expected):
    """Results against (score, ids) pairs: the same texts and scores, in the same order.

    Scores within rounding of each other may come in either order.
    """
    assert len(found) == len(expected)
    assert np.allclose([one.score for one in found], [pair[0] for pair in expected], atol=2e-5)
    for one, (value, ids) in zip(found, expected, strict=True):
        near = [other for v, other in expected if abs(v - value) < 4e-5]
        assert whole(one) in near if len(near) > 1 else whole(one) == ids


@pytest.mark.parametrize("seed", range(6))
def test_a_narrow_search_is_that_over_lists(seed):
    """And the end of a search that "never" stops early loses nothing: the lists go on."""
    rng = np.random.default_rng(seed)
    model = make_model(seed, loudness=rng.uniform(3, 7))
    settings = BeamSettings(
        width=3,
        n_best=int(rng.integers(1, 4)),
        length_penalty=float(rng.choice([0, 0.6, 1, 2, -0.5])),
        early_stopping=[True, False, "never"][seed % 3],
        max_new_tokens=int(rng.integers(2, 20)),
        logit_bias={int(rng.integers(5)): float(rng.choice([1.5, -math.inf]))} if seed > 2 else {},
        repetition_penalty=float(rng.choice([1, 1.4])),
        ignore_eos=seed == 5,
    )
    for prompt, found in zip(PROMPTS, search(model, PROMPTS, settings), strict=True):
        same(found, search_lists(model, prompt, settings))


@pytest.mark.parametrize(
    "changes",
    [{}, {"repetition_penalty": 1.5}, {"ignore_eos": True}, {"logit_bias": {2: -math.inf, 0: 1.0}}],
)
def test_width_one_is_greedy(changes):
    ends = Settings(40, temperature=0, on_context_full="stop", **changes)
    greedy = generate.complete(MODEL, PROMPTS, ends)
    for penalty in (-1.0, 0.0, 3.0):
        settings = BeamSettings(1, 1, penalty, True, max_new_tokens=40, **changes)
        for (one,), expected in zip(search(MODEL, PROMPTS, settings), greedy, strict=True):
            assert (one.token_ids, one.text) == (expected.token_ids, expected.text)
            assert one.finish_reason == expected.finish_reason
            assert np.allclose(one.logprobs, expected.logprobs, atol=1e-5)
    if not changes:
        assert {one.finish_reason for one in greedy} == {"eos", "length", "context"}


def test_what_a_result_tells():
    found = search(MODEL, PROMPTS, BeamSettings(3, 3, 0.7, "never", 12))
    reasons = set()
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert [one.sample for one in row] == [0, 1, 2]
        for one in row:
            n = len(one.token_ids)
            if not prompt:  # then it starts from end-of-text, as a score does
                logprobs = MODEL.score(whole(one)).logprobs
                assert np.allclose(one.score, sum(logprobs) / len(logprobs) ** 0.7, atol=1e-5)
                assert np.allclose(one.logprobs, logprobs[:n], atol=1e-5)
            assert one.prompt == prompt and one.text == MODEL.tokenizer.decode(one.token_ids)
            assert one.prefill_seconds > 0 and one.decode_seconds > 0
            full = {"length": 12, "context": 48 + 1 - len(prompt)}
            assert n == full.get(one.finish_reason, n)
            reasons.add(one.finish_reason)
    assert reasons == {"eos", "length", "context"}


@pytest.mark.parametrize(
    ("penalty", "early_stopping", "least", "most"),
    [(0.0, "never", 1, 2), (1.0, True, 2, 3), (1.0, False, 2, 9), (1.0, "never", 10, 39)],
)
def test_the_loop_ends_early(monkeypatch, penalty, early_stopping, least, most):
    """Where end-of-text is likely little is left to look for, least so without a penalty."""
    run, steps = beam_search.search_chunk, [1]

    def watched(*args):
        found = run(*args)
        steps.append(int(found.n_tokens))
        return found

    monkeypatch.setattr(beam_search, "search_chunk", watched)
    settings = BeamSettings(3, 1, penalty, early_stopping, 40, {EOT: 1.0})
    assert search(MODEL, ["ab"], settings)[0][0].finish_reason == "eos"
    assert least <= steps[-1] <= most


def test_no_setting_but_the_width_compiles():
    search(MODEL, PROMPTS, BeamSettings(3, max_new_tokens=25, ignore_eos=True))
    before = compilations.programs
    for settings in (
        BeamSettings(3, 2, 1, "never", 30, ignore_eos=True),
        BeamSettings(3, 3, -0.5, True, 3, {1: 2.0}, 1.3),
        BeamSettings(3, 1, 0, True, 1),
    ):
        search(MODEL, ["abc", "d" * 7, "a", *PROMPTS[3:]], settings)
    assert compilations.programs == before


def test_impossible_settings_are_refused():
    impossible = {"width": 0, "n_best": 5, "early_stopping": "always", "length_penalty": math.nan}
    for field, value in (impossible | {"repetition_penalty": 0.0}).items():
        with pytest.raises(UserError, match=field):
            BeamSettings(**{field: value})


def test_where_nothing_can_follow_the_search_says_so():
    with pytest.raises(UserError, match="forbids every token"):
        search(MODEL, ["a"], BeamSettings(3, logit_bias=dict.fromkeys(range(5), -math.inf)))
    bias = dict.fromkeys((0, 1, EOT), -math.inf)
    two = search(MODEL, ["a"], BeamSettings(3, 3, max_new_tokens=1, logit_bias=bias))[0]
    assert sorted(one.token_ids for one in two) == [[2], [3]]


def test_numbers_that_are_none_are_told():
    model = dataclasses.replace(MODEL, params=jax.tree.map(lambda a: a * np.nan, MODEL.params))
    with pytest.raises(UserError, match="not a number"):
        search(model, ["a"], BeamSettings(3, max_new_tokens=40))
