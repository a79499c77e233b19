"""Where texts end, slide or are refused; what the caller may ask for."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from byte_models import CONFIG, make_model

from gpt import flops, hardware
from gpt.data.tokenizers import IdTokenizer
from gpt.errors import UserError
from gpt.model import transformer
from gpt.sampling import beam_search, decode_loop, engine, generate
from gpt.sampling.settings import Settings


@pytest.fixture(scope="module")
def model():
    return make_model()


def ids(completions):
    return [(c.token_ids, c.finish_reason) for c in completions]


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
    state = types.SimpleNamespace(eot=np.array([3, 5]), remaining_B=np.array([4, 4, 4]))
    assert decode_loop.count_remaining(state, np.array([3, 4, 5])).tolist() == [0, 3, 0]


def test_end_of_text_ends_one_row_and_not_the_others(model):
    """The head made to shout end-of-text after byte "x" alone."""
    eot = model.tokenizer.eot_token
    settings = Settings(max_new_tokens=12, temperature=0)
    before = generate.complete(model, ["abc", "x"], settings)
    x_row = transformer.bind(CONFIG, model.params).hidden(np.array([[ord("x")]]))[0][0, 0]
    table = model.params["tokens"].at[eot].set(x_row * 100)
    shouting = dataclasses.replace(model, params=model.params | {"tokens": table})
    ended = generate.complete(shouting, ["x"], settings)[0]
    assert ended.finish_reason == "eos" and ended.text == "" and ended.token_ids == []
    after = generate.complete(shouting, ["abc", "x"], settings)
    assert after[1].finish_reason == "eos"
    if eot not in after[0].token_ids:
        assert len(after[0].token_ids) == len(before[0].token_ids) or after[0].finish_reason


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ("x" * 129, {}, "129 tokens.*128"),
        ("x", {"logit_bias": {257: 1.0}}, "logit_bias names token 257"),
        ("x", {"num_samples": 10**9}, "ask for fewer samples"),
    ],
)
def test_a_stream_is_refused_when_it_is_asked_for(model, prompt, settings, words):
    """Not when its first piece is: by then a server has sent its headers."""
    with pytest.raises(UserError, match=words):
        generate.stream(model, [prompt], Settings(**settings))
    with pytest.raises(UserError, match="show_probs is 258: expected 0 to 257"):
        generate.stream(model, ["x"], Settings(), top=258)


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


def test_each_prompt_may_have_its_own_settings(model):
    each = [Settings(max_new_tokens=9, seed=3), Settings(max_new_tokens=5, num_samples=2)]
    done = generate.complete(model, ["ab", "cd"], each)
    alone = [generate.complete(model, [p], s) for p, s in zip(["ab", "cd"], each, strict=True)]
    assert ids(done) == ids([*alone[0], *alone[1]])
    assert [c.sample for c in done] == [0, 0, 1]
    with pytest.raises(UserError, match="2 settings for 1 prompts"):
        generate.complete(model, ["ab"], each)


def test_where_nothing_can_follow_sampling_says_so(model):
    """The last token that the bias leaves is end-of-text, which is drawn unless it is ignored."""
    bias = dict.fromkeys(range(256), -np.inf)
    assert generate.complete(model, ["a"], Settings(logit_bias=bias))[0].finish_reason == "eos"
    with pytest.raises(UserError, match="logit_bias forbids every token: expected one that may"):
        generate.complete(model, ["a"], Settings(logit_bias=bias, ignore_eos=True))


@pytest.mark.parametrize("prompt", [[257], [-1], [3, 999], [1.5], ["a"]])
def test_ids_outside_the_vocabulary_are_refused(model, prompt):
    with pytest.raises(UserError, match="token id"):
        generate.complete(model, [prompt], Settings())


def test_an_empty_prompt_needs_an_end_of_text(model):
    """Which a model without a tokenizer may not have; any id will do instead."""
    nameless = dataclasses.replace(model, tokenizer=IdTokenizer(257, -1))
    with pytest.raises(UserError, match="prompt is empty, and no end-of-text stands before it"):
        generate.complete(nameless, [[]], Settings())
    assert generate.complete(nameless, [[7]], Settings(max_new_tokens=1))[0].prompt == "<7>"


def test_a_character_begun_by_the_prompt_is_whole(model):
    """Two of three bytes in the prompt, the third by force: no U+FFFD that nobody wrote."""
    first, second, third = "天".encode()
    settings = Settings(max_new_tokens=1, temperature=0, logit_bias={third: 1e6})
    done = generate.complete(model, [[65, first, second]], settings)[0]
    assert (done.prompt, done.text) == ("A", "天")
    widely = beam_search.BeamSettings(2, 2, max_new_tokens=1, logit_bias={third: 1e6})
    assert beam_search.search(model, [[65, first, second]], widely)[0][0].text == "天"


def test_a_stop_string_of_half_a_character_is_met_at_the_end(model):
    """Only when no more bytes can follow is it known that what is there is no character."""
    bias = {"天".encode()[0]: 1e6}
    settings = Settings(max_new_tokens=1, temperature=0, logit_bias=bias, stop=("\ufffd",))
    done = generate.complete(model, ["a"], settings)[0]
    assert (done.text, done.finish_reason) == ("", "stop")


@pytest.mark.parametrize(("longest", "slots"), [(29, 32), (30, 64)])
@pytest.mark.parametrize("search", [False, True], ids=["samples", "beams"])
def test_more_rows_than_memory_holds_are_refused_before_they_are_made(
    model, search, longest, slots, monkeypatch
):
    """Told to the last byte: weights, the cache, and nine bytes a token of the vocabulary."""
    c, rows, prompts = model.config, 10, ["", "x" * longest]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    need = weights + flops.cache_bytes(c, rows, slots) + 9 * rows * c.vocab_size

    def ask():
        if search:
            beam_search.search(
                model, prompts, beam_search.BeamSettings(rows // 2, max_new_tokens=4)
            )
        else:
            generate.complete(model, prompts, Settings(num_samples=rows // 2, max_new_tokens=4))

    monkeypatch.setattr(hardware, "memory", lambda: (need, "a small machine"))
    ask()
    monkeypatch.setattr(hardware, "memory", lambda: (need - 1, "a small machine"))
    monkeypatch.setattr(engine, "prefill", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=rf"10 rows of {slots} tokens take .* a small machine"):
        ask()


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
    sharded = types.SimpleNamespace(config=CONFIG, params=params, mesh=mesh)
    shared = flops.cache_bytes(CONFIG, 8, 32) + 9 * 8 * CONFIG.vocab_size
    need = (8 * 16 // 4 + 10) * 4 + shared // 4
    monkeypatch.setattr(hardware, "memory", lambda: (need, "a small device"))
    generate.require_room(sharded, 8, longest=3)
    monkeypatch.setattr(hardware, "memory", lambda: (need - 1, "a small device"))
    with pytest.raises(UserError, match="8 rows of 32 tokens"):
        generate.require_room(sharded, 8, longest=3)


def test_end_of_text_has_its_likeliest_tokens_too(model):
    eot = model.tokenizer.eot_token
    settings = Settings(max_new_tokens=9, logit_bias={eot: 1e9})
    done = generate.complete(model, ["a"], settings, top=3)[0]
    assert (done.finish_reason, done.token_ids, len(done.top)) == ("eos", [], 1)


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


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2**31),
        ("temperature", 1e39),
        ("num_samples", -1),
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("logit_bias", {3: float("nan")}),
        ("stop", ("",)),
        ("stop", "text"),
        ("seed", -1),
        ("on_context_full", "drop"),
    ],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(UserError, match=setting):
        Settings(**{setting: value})
