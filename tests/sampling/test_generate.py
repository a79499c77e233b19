"""The driver: same text whatever the chunk, the batch or the capacity; few programs."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from byte_models import CONFIG, make_model

from gpt import flops, hardware
from gpt.errors import UserError
from gpt.model import transformer
from gpt.sampling import decode_loop, engine, generate, sampler
from gpt.sampling.prompts import make_rows, pad_prompts, read_prompt, require_room
from gpt.sampling.settings import Settings

PROMPTS = ["", "x", "a prompt of some forty bytes, give or take", "今天的天气很"]


@pytest.fixture(scope="module")
def model():
    return make_model()


def ids(completions):
    return [(c.token_ids, c.finish_reason) for c in completions]


def test_chunks_change_nothing_and_stream_equals_collected(model, watch):
    prefills = watch(engine, "prefill")
    settings = [Settings(max_new_tokens=50, num_samples=n) for n in (2, 1, 3, 1)]
    whole = generate.complete(model, PROMPTS, settings)
    assert [len(tokens_BT) for _, _, tokens_BT, _ in prefills] == [4]  # samples share a prefill
    for chunk in (1, 7, 64):
        done, texts = {}, [""] * 7
        for piece in generate.stream(model, PROMPTS, settings, chunk):
            done[piece.row] = piece.completion
            texts[piece.row] += piece.text
        assert ids([done[row] for row in sorted(done)]) == ids(whole)
        assert texts == [c.text for c in whole]
    assert [c.prompt for c in whole] == [PROMPTS[i] for i in (0, 0, 1, 2, 2, 2, 3)]
    assert [c.sample for c in whole] == [0, 1, 0, 0, 1, 2, 0]


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
    checksums = [read_prompt(m, "a").checksum for m in (flat, after_eot)]
    assert checksums[0] == checksums[1] != read_prompt(flat, "").checksum


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


def test_prompts_read_in_pieces_equal_prompts_read_at_once(model):
    ids = [[1, 2, 3], list(range(100)), list(range(40)), list(range(64))]
    tokens_BT, n_B = pad_prompts(ids, CONFIG.context_length)
    whole, logits_BV = engine.prefill_in_pieces(CONFIG, model.params, tokens_BT, n_B)
    pieces, again_BV = engine.prefill_in_pieces(CONFIG, model.params, tokens_BT, n_B, 32)
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


def test_chunks_of_fixed_length_give_the_same_text(monkeypatch, watch):
    """As on an accelerator: rows that are done or have filled the context draw nothing meanwhile,
    and the cache grows before a chunk would fill it, at once to the size that the chunk needs."""
    model = make_model(dataclasses.replace(CONFIG, context_length=96, n_layers=1))
    settings = [
        Settings(max_new_tokens=90, temperature=0.9, on_context_full="slide", ignore_eos=True),
        Settings(max_new_tokens=5, temperature=0, repetition_penalty=1.5),
        Settings(max_new_tokens=70, top_p=0.9, top_k=50),
        Settings(max_new_tokens=70, min_p=0.05, stop=("e",)),
    ]
    expected = generate.complete(model, PROMPTS, settings, top=2)
    for module in (sampler, decode_loop, generate):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    chunks = watch(generate, "decode_chunk")
    found = generate.complete(model, PROMPTS, settings, top=2)
    assert {state.cache.capacity for _, _, state, *_ in chunks} == {96}
    assert {size for *_, size, _ in chunks} == {64}
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == other.logprobs and one.top == other.top


def test_the_next_chunk_begins_before_the_text_is_handed_out(model, watch):
    chunks = watch(generate, "decode_chunk")
    texts = generate.stream(model, ["a"], Settings(max_new_tokens=9, ignore_eos=True), chunk=4)
    assert [len(chunks) for _ in texts] == [1, 2, 2]


def test_buckets():
    assert [engine.bucket(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]
    sizes = [(129, 192), (192, 192), (193, 256), (257, 384), (385, 512), (700, 768), (769, 1000)]
    assert [engine.bucket(n, 1000) for n, _ in sizes] == [size for _, size in sizes]


# Where texts end, slide or are refused; what the caller may ask for.


def test_finish_reasons(model):
    context = CONFIG.context_length
    ends = Settings(max_new_tokens=500, temperature=0, on_context_full="stop")
    done = generate.complete(model, ["x" * 20], ends)[0]
    assert done.finish_reason == "context" and len(done.token_ids) == context + 1 - 20
    done = generate.complete(model, ["x" * context], ends)[0]
    assert done.finish_reason == "context" and len(done.token_ids) == 1
    done = generate.complete(model, ["x"], Settings(max_new_tokens=1))[0]
    assert done.finish_reason == "length" and len(done.token_ids) == 1


def test_the_device_stops_at_any_end_of_text():
    """Else it would compute steps that the host throws away."""
    state = types.SimpleNamespace(end_ids=np.array([3, 5]), remaining_B=np.array([4, 4, 4]))
    assert decode_loop.count_remaining(state, np.array([3, 4, 5])).tolist() == [0, 3, 0]


def test_end_of_text_ends_one_row_and_not_the_others(model):
    eot = model.tokenizer.eot_token
    going = Settings(max_new_tokens=12, temperature=0, ignore_eos=True)
    shouting = Settings(max_new_tokens=12, temperature=0, logit_bias={eot: 1e9})
    other, ended = generate.complete(model, ["abc", "x"], [going, shouting], top=3)
    assert (other.finish_reason, len(other.token_ids)) == ("length", 12)
    assert (ended.finish_reason, ended.text, ended.token_ids) == ("eos", "", [])
    assert len(ended.top) == 1  # end-of-text has its likeliest tokens too


def test_a_stream_is_refused_when_it_is_asked_for(model):
    """Not when its first piece is: by then a server has sent its headers."""
    for prompt, settings, words in (
        ("x" * 129, {}, "prompt 1 has 129 tokens.*128"),
        ("x", {"logit_bias": {257: 1.0}}, "logit_bias names token 257"),
        ("x", {"num_samples": 10**9}, "ask for fewer samples"),
        *(([token], {}, "token id") for token in (257, -1, 1.5, "a")),
    ):
        with pytest.raises(UserError, match=words):
            generate.stream(model, [prompt], Settings(**settings))
    with pytest.raises(UserError, match="show_probs is 258: expected 0 to 257"):
        generate.stream(model, ["x"], Settings(), top=258)
    with pytest.raises(UserError, match="2 settings for 1 prompts"):
        generate.stream(model, ["x"], [Settings(), Settings()])


def test_a_full_context_slides_to_its_last_half(model):
    """Each token is the likeliest after the window that the documentation promises."""
    C = CONFIG.context_length
    settings = Settings(max_new_tokens=3 * C, temperature=0, on_context_full="slide")
    done = generate.complete(model, ["x" * 100], dataclasses.replace(settings, ignore_eos=True))[0]
    assert done.finish_reason == "length" and len(done.token_ids) == 3 * C
    text, start = [*b"x" * 100, *done.token_ids], 0
    forward = jax.jit(transformer.forward, static_argnums=0)
    for at in range(100, len(text)):
        while at - start > C:  # read so far: text[start:at]
            start += C - C // 2
        window = np.zeros((1, C), np.int32)
        window[0, : at - start] = text[start:at]
        logits_V = np.asarray(forward(CONFIG, model.params, window))[0, at - start - 1, :256]
        gap = np.subtract(*np.sort(logits_V)[[-1, -2]])
        assert text[at] == logits_V.argmax() or gap < 2e-5 * max(1, logits_V.std())


def test_noise_goes_on_after_a_slide(model):
    """A slid row does not draw again what it drew at these places of the cache before."""
    # All tokens are alike: noise alone decides.
    flat = dataclasses.replace(model, params=jax.tree.map(np.zeros_like, model.params))
    settings = Settings(max_new_tokens=384, temperature=1, on_context_full="slide", ignore_eos=True)
    drawn = np.array(generate.complete(flat, [""], settings)[0].token_ids)
    half = CONFIG.context_length // 2
    assert not any(
        np.array_equal(drawn[i : i + half], drawn[i + half :][:half]) for i in range(200)
    )


def test_a_long_prompt_slides_and_is_refused_otherwise(model):
    settings = Settings(max_new_tokens=5, temperature=0, on_context_full="slide")
    long, last = list(b"abcdefgh" * 40), list(b"abcdefgh" * 40)[-CONFIG.context_length :]
    done = generate.complete(model, [long, last], settings)
    assert done[0].token_ids == done[1].token_ids
    auto = dataclasses.replace(settings, on_context_full="auto")
    assert generate.complete(model, [last], auto)[0].token_ids == done[1].token_ids
    with pytest.raises(UserError, match=r"prompt 2 has 320 tokens.*128"):
        generate.complete(model, [last, long], auto)


def test_where_nothing_can_follow_sampling_says_so(model):
    """The last token that the bias leaves is end-of-text, which is drawn unless it is ignored."""
    bias = dict.fromkeys(range(256), -np.inf)
    assert generate.complete(model, ["a"], Settings(logit_bias=bias))[0].finish_reason == "eos"
    with pytest.raises(UserError, match="logit_bias forbids every token: leave at least one"):
        generate.complete(model, ["a"], Settings(logit_bias=bias, ignore_eos=True))


def test_a_character_begun_by_the_prompt_is_whole(model):
    """Two of three bytes in the prompt, the third by force: no U+FFFD that nobody wrote."""
    first, second, third = "天".encode()
    settings = Settings(max_new_tokens=1, temperature=0, logit_bias={third: 1e6})
    done = generate.complete(model, [[65, first, second]], settings)[0]
    assert (done.prompt, done.text) == ("A", "天")


@pytest.mark.parametrize(("longest", "slots"), [(29, 32), (30, 64)])
def test_more_rows_than_memory_holds_are_refused(model, longest, slots, monkeypatch):
    """Counted to the byte: weights, the cache, and nine bytes per vocabulary entry. Beams
    are rows, as samples are."""
    c, prompts = model.config, ["", "x" * longest]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    need = weights + flops.cache_bytes(c, 10, slots) + 9 * 10 * c.vocab_size
    for settings, beam_width in ((Settings(4, num_samples=5), 1), (Settings(4), 5)):
        monkeypatch.setattr(hardware, "memory", lambda: (need, "a small machine"))
        make_rows(model, prompts, settings, beam_width=beam_width)
        monkeypatch.setattr(hardware, "memory", lambda: (need - 1, "a small machine"))
        with pytest.raises(UserError, match=rf"10 rows of {slots} tokens take .* a small machine"):
            make_rows(model, prompts, settings, beam_width=beam_width)


def test_room_is_counted_for_each_device(monkeypatch):
    """Weights that are not split lie whole on every device; the cache is split."""
    mesh = jax.sharding.AbstractMesh((4,), ("tensor",))
    split, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))
        for axis in ("tensor", None)
    )
    params = {
        "split": jax.ShapeDtypeStruct((8, 16), np.float32, sharding=split),
        "whole": jax.ShapeDtypeStruct((10,), np.float32, sharding=whole),
    }
    sharded = types.SimpleNamespace(config=CONFIG, params=params, mesh=mesh, draft=None)
    shared = flops.cache_bytes(CONFIG, 8, 32) + 9 * 8 * CONFIG.vocab_size
    need = (8 * 16 // 4 + 10) * 4 + shared // 4
    monkeypatch.setattr(hardware, "memory", lambda: (need, "a small device"))
    require_room(sharded, 8, longest=3)
    monkeypatch.setattr(hardware, "memory", lambda: (need - 1, "a small device"))
    with pytest.raises(UserError, match="8 rows of 32 tokens"):
        require_room(sharded, 8, longest=3)


def test_one_row_may_fail_after_its_neighbours_have_ended(model):
    each = [
        Settings(max_new_tokens=50, on_context_full="error", ignore_eos=True),
        Settings(max_new_tokens=90, ignore_eos=True),
    ]
    last = {}
    with pytest.raises(UserError, match="context of 128 tokens is full"):
        for piece in generate.stream(model, ["x" * 100, "y"], each):
            last[piece.row] = piece.completion
    assert last[1].finish_reason == "length" and last[0].finish_reason == "context"


def test_impossible_settings_are_refused():
    for setting, value in (
        ("max_new_tokens", 0),
        ("temperature", 1e39),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("logit_bias", {3: float("nan")}),
        ("stop", ("",)),
        ("stop", "text"),
        ("seed", -1),
        ("speculate", -1),
        ("on_context_full", "drop"),
    ):
        with pytest.raises(UserError, match=setting):
            Settings(**{setting: value})
