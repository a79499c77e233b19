"""Added tokens: found as their own library finds them, or refused with the reason."""

import json

import pytest
from standins import tokenizer_json, write_tokenizer

from gpt.convert import tokenizers_in
from gpt.errors import UserError

END = "<|endoftext|>"
GOOD = tokenizer_json([], {END: 256})


def read(folder, about=None):
    if about is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    told = []
    config = {"model_type": "gpt2", "eos_token_id": 256}
    return tokenizers_in.read(folder, config, 300, False, told.append), told


def listing(*tokens):
    return GOOD | {"added_tokens": [{"id": 256, "content": END}, *tokens]}


REFUSED = {
    "no list": (GOOD | {"added_tokens": 5}, "added_tokens is 5"),
    "a name twice": (listing({"id": 257, "content": END}), "the ids 256 and 257"),
    "one that begins another": (
        listing({"id": 257, "content": "<a>"}, {"id": 258, "content": "<a><b>"}),
        "'<a>'] begins another",
    ),
    "a name of ours": (listing({"id": 257, "content": "<|unused_280|>"}), "a name that is ours"),
    "found after NFC": (
        listing({"id": 257, "content": "<x>", "normalized": True})
        | {"normalizer": {"type": "NFC"}},
        "'<x>'] is sought in a text's NFC",
    ),
    "half a word": (listing({"id": 257, "content": "a", "single_word": True}), "single_word"),
    "the white space too": (listing({"id": 257, "content": "a", "rstrip": True}), "rstrip"),
    "an id below zero": (listing({"id": -1, "content": "a"}), "no text or no id"),
    "an id that is no integer": (listing({"id": 257.0, "content": "a"}), "no text or no id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_found_otherwise_is_refused(case, tmp_path):
    values, reason = REFUSED[case]
    with pytest.raises(UserError) as caught:
        read(write_tokenizer(tmp_path, values))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ([1], "no object of ids"),
        ({"x": {"content": "<y>"}}, "no object of ids"),
        ({"9" * 5000: {"content": "<y>"}}, "no object of ids"),
        ({"257": "<y>"}, "no object"),
        ({"257": {"content": END}}, "the ids 256 and 257"),
    ],
)
def test_a_table_beside_it_that_does_not_fit_is_refused(table, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        read(write_tokenizer(tmp_path, GOOD), {"added_tokens_decoder": table})


def test_what_is_put_around_a_text_is_said(tmp_path):
    level = GOOD["decoder"]
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    for after, said in (
        (None, False),
        (level, False),
        ({"type": "Sequence", "processors": [level]}, False),
        (template, True),
        ({"type": "Sequence", "processors": [level, template]}, True),
    ):
        _, told = read(write_tokenizer(tmp_path, GOOD | {"post_processor": after}))
        assert bool(told) is said
