"""What ends a text, what stands before it and what cannot be drawn, with a Llama 3's tokenizer."""

import dataclasses
import functools
import json

import pytest
import standin_tokenizers
from byte_models import LETTERS, make_model

from gpt.config import ModelConfig
from gpt.data.hf_tokenizer import HFTokenizer
from gpt.errors import UserError
from gpt.sampling import beam_search, generate
from gpt.sampling.prompts import read_prompt
from gpt.sampling.settings import Settings
from gpt.sampling.special_ids import find_special_ids

N_VOCAB = standin_tokenizers.N_VOCAB  # more ids than the tokenizer has tokens
CONFIG = ModelConfig(N_VOCAB, context_length=32, n_layers=1, n_heads=2, d_model=16)


@functools.cache
def llama():
    """A model whose config.json names one end of a text, and generation_config.json another."""
    content = standin_tokenizers.make("Llama 3")
    added = {one["content"]: one["id"] for one in json.loads(content)["added_tokens"]}
    bos, end, turn = (added[f"<|{name}|>"] for name in ("begin_of_text", "end_of_text", "eot_id"))
    files = {
        "tokenizer.json": content,
        "generation_config.json": json.dumps({"eos_token_id": [end, turn]}).encode(),
    }
    special_ids = {"bos_token_id": bos, "eos_token_id": end}
    tokenizer = HFTokenizer(files, N_VOCAB, special_ids, end)
    return make_model(CONFIG, tokenizer=tokenizer), bos, end, turn


def test_special_ids_of_a_tokenizer_that_came_with_a_model_and_of_our_own():
    model, bos, end, turn = llama()
    special = model.special_ids
    assert (special.ends, special.before, special.bos) == ((end, turn), (bos,), bos)
    assert special.not_text == {bos, end, turn}
    assert special.unused == tuple(range(max(bos, end, turn) + 1, N_VOCAB)) != ()
    ours = find_special_ids(LETTERS)
    assert (ours.ends, ours.before, ours.bos, ours.unused) == ((256,), (), None, ())
    assert ours.not_text == {256}


@pytest.mark.parametrize("which", [0, 1])
def test_any_end_ends_a_text_and_all_can_be_ignored(which):
    model, _, *ends = llama()
    bias = {ends[which]: 1e6}
    (done,) = generate.complete(model, ["the"], Settings(9, bias))
    assert (done.finish_reason, done.end_id, done.token_ids) == ("eos", ends[which], [])
    (done,) = generate.complete(model, ["the"], Settings(9, bias, ignore_eos=True))
    assert len(done.token_ids) == 9 and not set(done.token_ids) & set(ends)
    beam = functools.partial(beam_search.BeamSettings, 2, max_new_tokens=4, logit_bias=bias)
    ((best,),) = beam_search.search(model, ["the"], beam())
    assert (best.finish_reason, best.end_id) == ("eos", ends[which])
    ((best,),) = beam_search.search(model, ["the"], beam(ignore_eos=True))
    assert len(best.token_ids) == 4 and not set(best.token_ids) & set(ends)


def test_beams_live_on_though_all_ends_are_likely():
    """Each live text ends in two ways: twice the width of candidates would hold no other."""
    model, _, end, turn = llama()
    settings = beam_search.BeamSettings(
        3, 3, 5.0, "never", 6, {end: 30.0, turn: 30.0}, repetition_penalty=1.5
    )
    ((*found,),) = beam_search.search(model, ["the"], settings)
    assert len(found) == 3 and max(len(one.token_ids) for one in found) > 1


def test_an_id_without_a_token_cannot_be_drawn():
    model = llama()[0]
    bias = dict.fromkeys(model.special_ids.unused, 1e6)
    settings = Settings(20, bias, temperature=5.0, num_samples=4, ignore_eos=True)
    for done in generate.complete(model, ["the"], settings):
        assert len(done.token_ids) == 20 and "unused" not in done.text


def test_texts_follow_what_the_tokenizer_puts_before_them():
    """Prompts and scored texts; ids are read as they are given."""
    model, bos, end, _ = llama()
    ids = model.tokenizer.encode_ordinary("the cat")

    def read(prompt, prefix=None):
        return read_prompt(dataclasses.replace(model, prefix=prefix), prompt).ids

    assert read("the cat") == [bos, *ids] and read("") == [bos]
    assert read(ids) == ids and read([]) == [bos]
    assert read("the cat", "bos") == read(ids, "bos") == [bos, *ids]
    assert read("the cat", "eos") == read(ids, "eos") == [end, *ids]
    assert read("the cat", "none") == ids
    with pytest.raises(UserError, match="prompt is empty"):
        read("", "none")

    scored = model.score("the cat")
    assert (scored.prefix, scored.n_bytes) == ([bos], 7)
    after_end = dataclasses.replace(model, prefix="eos").score("the cat")
    assert after_end.prefix == [end] and after_end.logprobs != scored.logprobs
