"""The driver: same text whatever the chunk, the batch or the capacity; stops where it should."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from gpt import tokenizer
from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.model import transformer
from gpt.sampling import engine, generate, score
from gpt.sampling.settings import Settings
from gpt.stopwatch import compilations

CONFIG = ModelConfig(257, context_length=128, n_layers=2, n_heads=2, d_model=32)
PROMPTS = ["", "x", "a prompt of some forty bytes, give or take", "今天的天气很"]


def make_model(config=CONFIG, seed=0, loudness=6.0):
    """An untrained byte-level model, loud enough to prefer some bytes over others."""
    params = transformer.init(config, jax.random.key(seed))
    params = jax.tree.map(lambda a: a * loudness if a.ndim > 1 else a, params)
    letters = tokenizer.create("byte", lambda: (), 0)
    return types.SimpleNamespace(
        config=config, params=transformer.unstack(params), tokenizer=letters
    )


@pytest.fixture(scope="module")
def model():
    return make_model()


def ids(completions):
    return [(c.token_ids, c.finish_reason) for c in completions]


def collect(model, prompts, settings, chunk):
    done, text = {}, {}
    for piece in generate.stream(model, prompts, settings, chunk):
        done[piece.row] = piece.completion
        text[piece.row] = text.get(piece.row, "") + piece.text
    return [done[row] for row in sorted(done)], [text[row] for row in sorted(text)]


def test_chunks_change_nothing_and_stream_equals_collected(model):
    settings = Settings(max_new_tokens=50, num_samples=2)
    whole = generate.complete(model, PROMPTS, settings)
    for chunk in (1, 7, 64):
        done, text = collect(model, PROMPTS, settings, chunk)
        assert ids(done) == ids(whole)
        assert text == [c.text for c in whole] == [c.text for c in done]
    assert [c.prompt for c in whole] == [p for p in PROMPTS for _ in range(2)]
    assert [c.sample for c in whole] == [0, 1] * 4


def test_pieces_never_break_a_character(model):
    """The bytes of an untrained model are wild; the pieces add up to the bytes decoded whole."""
    settings = Settings(max_new_tokens=100, temperature=2.0)
    for seed in range(5):
        settings = dataclasses.replace(settings, seed=seed)
        done, text = collect(model, PROMPTS, settings, 3)
        for completion, streamed in zip(done, text, strict=True):
            raw = model.tokenizer.decode_bytes(completion.token_ids)
            assert streamed == raw.decode("utf-8", "replace")


def test_seed_and_sample_decide_the_text(model):
    settings = Settings(max_new_tokens=30, num_samples=3, temperature=1.0)
    first = generate.complete(model, PROMPTS, settings)
    assert ids(generate.complete(model, PROMPTS, settings)) == ids(first)
    other = generate.complete(model, PROMPTS, dataclasses.replace(settings, seed=1))
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))
    assert first[3].token_ids != first[4].token_ids != first[5].token_ids


def test_a_row_alone_draws_what_it_draws_in_a_batch(model):
    settings = Settings(max_new_tokens=40)
    together = generate.complete(model, PROMPTS, settings)
    alone = [generate.complete(model, [prompt], settings)[0] for prompt in PROMPTS]
    assert ids(together) == ids(alone)


def test_greedy_takes_the_likeliest_of_a_full_pass(model):
    """Token by token, without a cache: the oracle of decoding, across two growths of the cache."""
    done = generate.complete(model, ["ab"], Settings(max_new_tokens=90, temperature=0))[0]
    sequence = [*model.tokenizer.encode_ordinary("ab"), *done.token_ids]
    logits = np.asarray(transformer.forward(CONFIG, model.params, np.array([sequence])))[0]
    top = np.sort(logits, axis=-1)[:, -2:]
    for i, token in enumerate(done.token_ids):
        at = 1 + i
        gap = top[at, 1] - top[at, 0]
        assert token == logits[at].argmax() or gap < 2e-5 * max(1, logits.std())
    expected = score.score_ids(CONFIG, model.params, sequence, model.tokenizer.eot_token)
    assert len(expected) == len(sequence)


def test_logprobs_are_the_scores_of_the_text(model):
    """Through the cache and without one: a text drawn from end-of-text scores what it drew."""
    done = generate.complete(model, [""], Settings(max_new_tokens=60, top_k=5))[0]
    eot = model.tokenizer.eot_token
    scored = score.score_ids(CONFIG, model.params, done.token_ids, eot)
    assert np.allclose(done.logprobs, scored, atol=1e-4)


def test_finish_reasons(model):
    context = CONFIG.context_length
    done = generate.complete(model, ["x" * 20], Settings(max_new_tokens=500, temperature=0))[0]
    assert done.finish_reason == "context" and len(done.token_ids) == context + 1 - 20
    done = generate.complete(model, ["x" * context], Settings(max_new_tokens=5))[0]
    assert done.finish_reason == "context" and len(done.token_ids) == 1
    done = generate.complete(model, ["x"], Settings(max_new_tokens=1))[0]
    assert done.finish_reason == "length" and len(done.token_ids) == 1


def test_end_of_text_ends_one_row_and_not_the_others(model):
    """The head made to shout end-of-text after byte "x" alone."""
    eot = model.tokenizer.eot_token
    settings = Settings(max_new_tokens=12, temperature=0)
    before = generate.complete(model, ["abc", "x"], settings)
    x_row = transformer.hidden(CONFIG, model.params, np.array([[ord("x")]]))[0][0, 0]
    table = model.params["tokens"].at[eot].set(x_row * 100)
    shouting = types.SimpleNamespace(
        config=CONFIG, tokenizer=model.tokenizer, params=model.params | {"tokens": table}
    )
    ended = generate.complete(shouting, ["x"], settings)[0]
    assert ended.finish_reason == "eos" and ended.text == "" and ended.token_ids == []
    after = generate.complete(shouting, ["abc", "x"], settings)
    assert after[1].finish_reason == "eos"
    if eot not in after[0].token_ids:
        assert len(after[0].token_ids) == len(before[0].token_ids) or after[0].finish_reason


def test_prompt_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match=r"129 tokens.*128"):
        generate.complete(model, ["x" * 129], Settings())


def test_nothing_compiles_over_200_decode_steps():
    """After a first text, others of any settings and lengths in the same shapes are free."""
    model = make_model(dataclasses.replace(CONFIG, context_length=256))
    warm = generate.complete(model, ["abc"], Settings(max_new_tokens=220, temperature=0))
    assert len(warm[0].token_ids) == 220  # through every capacity
    before = compilations.programs
    for i, settings in enumerate(
        [
            Settings(),
            Settings(temperature=0),
            Settings(temperature=1.3, top_k=7, seed=9),
            Settings(top_p=0.9, min_p=0.01, repetition_penalty=1.2, ignore_eos=True),
            Settings(logit_bias={5: 2.0}, stop=("no such text",)),
        ]
    ):
        done = generate.complete(model, ["abc" + "d" * i], settings)
        assert len(done[0].token_ids) == 200 or done[0].finish_reason == "eos"
    assert compilations.programs == before


def test_buckets():
    assert [engine.bucket(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", 0), ("num_samples", -1), ("temperature", float("nan")), ("top_k", -1)],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(UserError, match=setting):
        Settings(**{setting: value})
