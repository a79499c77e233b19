"""The driver: same text whatever the chunk, the batch or the capacity; few programs."""

import dataclasses

import jax
import numpy as np
import pytest
from byte_models import CONFIG, make_model

from gpt.compile_log import compilations
from gpt.model import transformer
from gpt.sampling import decode_loop, engine, generate
from gpt.sampling.settings import Settings

PROMPTS = ["", "x", "a prompt of some forty bytes, give or take", "今天的天气很"]


@pytest.fixture(scope="module")
def model():
    return make_model()


def ids(completions):
    return [(c.token_ids, c.finish_reason) for c in completions]


def test_chunks_change_nothing_and_stream_equals_collected(model):
    settings = Settings(max_new_tokens=50, num_samples=2)
    whole = generate.complete(model, PROMPTS, settings)
    for chunk in (1, 7, 64):
        done, texts = {}, [""] * 8
        for piece in generate.stream(model, PROMPTS, settings, chunk):
            done[piece.row] = piece.completion
            texts[piece.row] += piece.text
        assert ids([done[row] for row in sorted(done)]) == ids(whole)
        assert texts == [c.text for c in whole]
    assert [c.prompt for c in whole] == [p for p in PROMPTS for _ in range(2)]
    assert [c.sample for c in whole] == [0, 1] * 4


def test_seed_and_sample_decide_the_text(model):
    settings = Settings(max_new_tokens=30, num_samples=3, temperature=1.0)
    first = generate.complete(model, PROMPTS, settings)
    assert ids(generate.complete(model, PROMPTS, settings)) == ids(first)
    other = generate.complete(model, PROMPTS, dataclasses.replace(settings, seed=1))
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))
    assert first[3].token_ids != first[4].token_ids != first[5].token_ids


def test_prompts_of_one_length_draw_independently():
    """A model to which all prompts are alike: only the noise tells them apart."""
    model = make_model()
    flat = dataclasses.replace(model, params=jax.tree.map(np.zeros_like, model.params))
    prompts = [f"{i:03}" for i in range(64)]
    drawn = [c.token_ids for c in generate.complete(flat, prompts, Settings(2, temperature=1.0))]
    assert len({tuple(tokens) for tokens in drawn}) > 60
    low = np.mean([tokens[0] < 128 for tokens in drawn if tokens])
    assert 0.3 < low < 0.7
    # Neither their order nor what stands before them matters.
    again = generate.complete(flat, prompts[::-1], Settings(2, temperature=1.0))
    assert [c.token_ids for c in again] == drawn[::-1]
    after_eot = dataclasses.replace(flat, prefix="eos")
    assert generate.read_prompt(after_eot, "a").ids == [256, ord("a")]
    checksums = [generate.read_prompt(m, "a").checksum for m in (flat, after_eot)]
    assert checksums[0] == checksums[1] != generate.read_prompt(flat, "").checksum == 0


def test_greedy_takes_the_likeliest_of_a_full_pass(model):
    """Token by token, without a cache: the oracle of decoding, across two growths of the cache; the
    log-probabilities that are reported, and the likeliest tokens, are those of the full pass."""
    settings = Settings(max_new_tokens=90, temperature=0)
    done = generate.complete(model, ["ab"], settings, top=3)[0]
    sequence = [*b"ab", *done.token_ids]
    logits_TV = np.asarray(transformer.forward(CONFIG, model.params, np.array([sequence])))[0]
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    for i, (token, logprob) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        likeliest = np.sort(logits_TV[1 + i])[::-1]
        assert likeliest[0] - logits_TV[1 + i, token] < 2e-5 * max(1, logits_TV.std())
        assert logprob == pytest.approx(logprobs_TV[1 + i, token], abs=1e-4)
        expected = np.exp(np.sort(logprobs_TV[1 + i])[:-4:-1])
        assert [p for _, p in done.top[i]] == pytest.approx(expected, abs=1e-5)


def test_nothing_compiles_over_200_decode_steps():
    """After a first text, others of any settings and lengths in the same shapes are free."""
    model = make_model(dataclasses.replace(CONFIG, context_length=256, n_layers=1))
    warm = generate.complete(model, ["abc"], Settings(max_new_tokens=220, temperature=0))
    assert len(warm[0].token_ids) == 220  # through every capacity
    before = compilations.programs
    for i, settings in enumerate(
        [
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


def test_prompts_read_in_pieces_equal_prompts_read_at_once(model):
    ids = [[1, 2, 3], list(range(100)), list(range(40)), list(range(64))]
    tokens_BT, n_B = generate.pad_prompts(ids, CONFIG.context_length)
    whole, logits_BV = engine.read(CONFIG, model.params, tokens_BT, n_B)
    pieces, again_BV = engine.read(CONFIG, model.params, tokens_BT, n_B, 32)
    assert np.array_equal(whole.length_B, pieces.length_B)
    allowed = 2e-5 * max(1, np.asarray(logits_BV).std())
    assert np.abs(np.asarray(logits_BV - again_BV)).max() <= allowed
    token_B, active_B = np.array([5, 6, 7, 8], np.int32), np.ones(4, bool)
    _, next_BV = engine.decode_step(CONFIG, model.params, whole, token_B, active_B)
    _, other_BV = engine.decode_step(CONFIG, model.params, pieces, token_B, active_B)
    assert np.abs(np.asarray(next_BV - other_BV)).max() <= allowed


def test_repetition_penalty_sees_prompt_and_completion(model):
    """So large a penalty forbids: every token is new."""
    louder = dict.fromkeys(range(256), 100.0)  # all above zero, where the penalty divides
    settings = Settings(60, louder, repetition_penalty=1e9, ignore_eos=True, temperature=0)
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


def test_the_device_stops_when_all_rows_have(monkeypatch):
    """One draw more than steps: the first is the prefill's."""
    calls, honest = [], engine.decode_step

    def counted(*args):
        jax.debug.callback(lambda: calls.append("step"))
        return honest(*args)

    monkeypatch.setattr(engine, "decode_step", counted)
    model = make_model(dataclasses.replace(CONFIG, d_model=40, n_layers=1))
    generate.complete(model, ["ab", "c"], Settings(max_new_tokens=4, ignore_eos=True))
    jax.effects_barrier()
    assert len(calls) == 3


def test_chunks_of_fixed_length_give_the_same_text(monkeypatch):
    """As on an accelerator: rows that are done or have filled the cache draw nothing meanwhile."""
    model = make_model(dataclasses.replace(CONFIG, context_length=48, n_layers=1))
    settings = [
        Settings(max_new_tokens=90, temperature=0.9, on_context_full="slide", ignore_eos=True),
        Settings(max_new_tokens=5, temperature=0, repetition_penalty=1.5),
        Settings(max_new_tokens=70, top_p=0.9, top_k=50),
        Settings(max_new_tokens=70, min_p=0.05, stop=("e",)),
    ]
    expected = generate.complete(model, PROMPTS, settings, top=2)
    for module in (generate, decode_loop):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    found = generate.complete(model, PROMPTS, settings, top=2)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == other.logprobs and one.top == other.top


def test_the_next_chunk_begins_before_the_text_is_handed_out(model, monkeypatch):
    n_chunks, honest = 0, generate.decode_chunk

    def counted(*args):
        nonlocal n_chunks
        n_chunks += 1
        return honest(*args)

    monkeypatch.setattr(generate, "decode_chunk", counted)
    texts = generate.stream(model, ["a"], Settings(max_new_tokens=9, ignore_eos=True), chunk=4)
    begun = [n_chunks for _ in texts]
    assert begun == [1, 2, 2]


def test_samples_share_a_prefill(model, monkeypatch):
    calls, honest = [], engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda *args: calls.append(args[2]) or honest(*args))
    generate.complete(model, ["ab", "c"], Settings(max_new_tokens=4, num_samples=5))
    assert [len(tokens_BT) for tokens_BT in calls] == [2]


def test_buckets():
    assert [engine.bucket(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]
    sizes = [(129, 192), (192, 192), (193, 256), (257, 384), (385, 512), (700, 768), (769, 1000)]
    assert [engine.bucket(n, 1000) for n, _ in sizes] == [size for _, size in sizes]
