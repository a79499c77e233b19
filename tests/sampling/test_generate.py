"""The driver: same text whatever the chunk, the batch or the capacity; stops where it should."""

import dataclasses

import jax
import numpy as np
import pytest
from byte_models import make_model

from gpt.compile_log import compilations
from gpt.config import ModelConfig
from gpt.model import transformer
from gpt.sampling import decode_loop, engine, generate, scoring
from gpt.sampling.settings import Settings

CONFIG = ModelConfig(257, context_length=128, n_layers=2, n_heads=2, d_model=32)
PROMPTS = ["", "x", "a prompt of some forty bytes, give or take", "今天的天气很"]


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


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
    expected = scoring.score_ids(CONFIG, model.params, sequence, model.tokenizer.eot_token)
    assert len(expected) == len(sequence)


def test_logprobs_are_the_scores_of_the_text(model):
    """Through the cache and without one: a text drawn from end-of-text scores what it drew."""
    done = generate.complete(model, [""], Settings(max_new_tokens=60, top_k=5))[0]
    eot = model.tokenizer.eot_token
    scored = scoring.score_ids(CONFIG, model.params, done.token_ids, eot)
    assert np.allclose(done.logprobs, scored, atol=1e-4)


def test_nothing_compiles_over_200_decode_steps():
    """After a first text, others of any settings and lengths in the same shapes are free."""
    model = make_model(dataclasses.replace(CONFIG, context_length=256, n_layers=1))
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


def test_programs_are_few():
    """One prefill per (batch, bucket), one loop per (batch, capacity), whatever the settings."""
    config = dataclasses.replace(CONFIG, d_model=24, n_layers=1)  # no other test's programs
    model = make_model(config)
    before = engine.prefill._cache_size(), decode_loop.decode_chunk._cache_size()
    for temperature in (0.0, 0.9):
        for prompts in (["a"], ["b" * 30], ["c" * 33], ["a", "b" * 20], ["a", "b" * 40]):
            settings = Settings(max_new_tokens=20, temperature=temperature, ignore_eos=True)
            generate.complete(model, prompts, settings)
    after = engine.prefill._cache_size(), decode_loop.decode_chunk._cache_size()
    prefills, loops = (b - a for a, b in zip(before, after, strict=True))
    assert prefills == 4  # 1 and 2 rows, buckets of 32 and 64
    assert loops == 4  # the same, and those grown from 32 to 64 among them


@pytest.mark.parametrize("piece", [8, 32])
def test_prompts_read_in_pieces_equal_prompts_read_at_once(model, piece):
    ids = [[1, 2, 3], list(range(100)), list(range(40)), list(range(64))]
    tokens_BT, n_B = generate.pad_prompts(ids, CONFIG.context_length)
    whole, logits_BV = engine.read(CONFIG, model.params, tokens_BT, n_B)
    pieces, again_BV = engine.read(CONFIG, model.params, tokens_BT, n_B, piece)
    assert np.array_equal(whole.length_B, pieces.length_B)
    allowed = 2e-5 * max(1, np.asarray(logits_BV).std())
    assert np.abs(np.asarray(logits_BV - again_BV)).max() <= allowed
    token_B, active_B = np.array([5, 6, 7, 8], np.int32), np.ones(4, bool)
    _, next_BV = engine.decode_step(CONFIG, model.params, whole, token_B, active_B)
    _, other_BV = engine.decode_step(CONFIG, model.params, pieces, token_B, active_B)
    assert np.abs(np.asarray(next_BV - other_BV)).max() <= allowed


def test_the_likeliest_tokens_are_those_of_a_full_pass(model):
    done = generate.complete(model, ["ab"], Settings(max_new_tokens=40), top=3)[0]
    sequence = np.array([[*b"ab", *done.token_ids]])
    probs = np.asarray(jax.nn.softmax(transformer.forward(CONFIG, model.params, sequence)[0]))
    assert len(done.top) == len(done.token_ids)
    for i, top in enumerate(done.top):
        assert [p for _, p in top] == pytest.approx(np.sort(probs[1 + i])[:-4:-1], abs=1e-5)
        assert [p for _, p in top] == pytest.approx([probs[1 + i][t] for t, _ in top], abs=1e-5)


def test_repetition_penalty_sees_prompt_and_completion(model):
    """So large a penalty forbids: every token is new."""
    settings = Settings(max_new_tokens=60, temperature=0, repetition_penalty=1e9)
    louder = dict.fromkeys(range(256), 100.0)  # all above zero, where the penalty divides
    settings = dataclasses.replace(settings, logit_bias=louder, ignore_eos=True)
    done = generate.complete(model, ["abc"], settings)[0]
    assert len({*b"abc", *done.token_ids}) == 63


def test_a_program_compiled_in_steady_state_is_told(model, monkeypatch):
    honest = generate.decode_chunk

    def recompiling(*args):
        jax.jit(lambda x: x + 1)(0)
        return honest(*args)

    monkeypatch.setattr(generate, "decode_chunk", recompiling)
    with pytest.warns(UserWarning, match="compiled in the middle of decoding"):
        generate.complete(model, ["a"], Settings(max_new_tokens=50, ignore_eos=True))


def counting(monkeypatch, module, name, calls):
    """Have `module.name` note each time that the device runs it."""
    honest = getattr(module, name)

    def counted(*args):
        jax.debug.callback(lambda: calls.append(name))
        return honest(*args)

    monkeypatch.setattr(module, name, counted)


def test_the_device_stops_when_all_rows_have(monkeypatch):
    """One draw more than steps: the first is the prefill's."""
    calls, model = [], make_model(dataclasses.replace(CONFIG, d_model=40, n_layers=1))
    counting(monkeypatch, engine, "decode_step", calls)
    generate.complete(model, ["ab", "c"], Settings(max_new_tokens=4, ignore_eos=True))
    jax.effects_barrier()
    assert len(calls) == 3


def test_samples_share_a_prefill(model, monkeypatch):
    calls, honest = [], engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda *args: calls.append(args[2]) or honest(*args))
    generate.complete(model, ["ab", "c"], Settings(max_new_tokens=4, num_samples=5))
    assert [len(tokens_BT) for tokens_BT in calls] == [2]


def test_buckets():
    assert [engine.bucket(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]
    sizes = [(129, 192), (192, 192), (193, 256), (257, 384), (385, 512), (700, 768), (769, 1000)]
    assert [engine.bucket(n, 1000) for n, _ in sizes] == [size for _, size in sizes]
