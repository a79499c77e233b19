"""Other people's tokenizers: the ids of a plain reading of their files, or the reason why not."""

import json
import random

import pytest
import regex
import standins
from hypothesis import given
from hypothesis import strategies as st
from plain_bpe import learn, plainly
from standins import tokenizer_json, write_tokenizer

from gpt.convert import bpe, pieces, tokenizers_in, tokenizers_out
from gpt.data import tokenizers
from gpt.errors import UserError

END = "<|endoftext|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def merges():
    """80 pairs, learned from invented words, Chinese and code."""
    rng = random.Random(0)
    words = ["".join(rng.choices(["the", "ca", "t", "on", "in", "g"], k=3)) for _ in range(40)]
    text = " ".join(rng.choices(words, k=200)) + "今天的天气很好 " * 30
    return learn(text + "def f(x):\n    return x + 123\n" * 30, 80)


def read(folder, n_vocab=400, eos=None, **config):
    told = []
    config |= {"model_type": "gpt2", "eos_token_id": eos}
    return tokenizers_in.read(folder, config, n_vocab, False, told.append), told


WILD = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the cat 今天\n 1"))
)


@pytest.mark.parametrize("first", [0, 3])
def test_ids_are_those_of_the_list_of_pairs(first, merges, tmp_path):
    """Special tokens after the others, as in GPT-2, and before them, as in SmolLM2."""
    special = {END: 336, "<|pad|>": 338} if first == 0 else {END: 0, "<a>": 1, "<b>": 2}
    values = tokenizer_json(merges, special, first)
    found, _ = read(write_tokenizer(tmp_path, values), eos=special[END])
    assert found.n_vocab == 400 and found.eot_token == special[END]
    ids = {bpe.unspell(t): i for t, i in values["model"]["vocab"].items()}

    @given(WILD)
    def check(text):
        assert found.encode_ordinary(text) == plainly(text, merges, ids)
        assert found.decode(found.encode_ordinary(text)) == text

    check()
    name, i = list(special.items())[-1]
    assert found.encode(f"the{name}cat", allowed_special="all") == [
        *found.encode_ordinary("the"),
        i,
        *found.encode_ordinary("cat"),
    ]
    again = tokenizers.from_json(json.loads(json.dumps(tokenizers.to_json(found))))
    assert tokenizers.digest(again) == tokenizers.digest(found)
    assert again.encode("x" + name, allowed_special="all")[-1] == i
    assert all(found.decode_bytes([i]) for i in range(400)), "an id that decodes to nothing"


CUTS = {
    "llama 3": [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated"}],
    "digits alone": [{"type": "Digits", "individual_digits": True}],
    "digits together": [{"type": "Digits", "individual_digits": False}],
}


def sequence(*steps, use_regex):
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [*steps, level]}


@pytest.mark.parametrize("cut", CUTS)
def test_text_is_cut_as_the_file_says(cut, tmp_path):
    """Against the steps themselves, one after the other."""
    split = CUTS[cut][0]["type"] == "Split"
    values = tokenizer_json([], {END: 256}, pre_tokenizer=sequence(*CUTS[cut], use_regex=not split))
    found, _ = read(write_tokenizer(tmp_path, values))
    digits = r"\p{N}|[^\p{N}]+" if cut == "digits alone" else r"\p{N}+|[^\p{N}]+"

    @given(st.text(st.sampled_from("a1٣ \n\t'sd.今²")))
    def check(text):
        steps = [text] if split else regex.findall(digits, text)
        wanted = [p for s in steps for p in regex.findall(LLAMA3 if split else pieces.GPT2, s)]
        assert regex.findall(found._pat_str, text) == wanted

    check()


def test_nfc_is_kept_and_special_tokens_are_found_before_it(tmp_path):
    values = tokenizer_json([], {END: 256}, normalizer={"type": "NFC"})
    found, _ = read(write_tokenizer(tmp_path, values))
    found = tokenizers.from_json(tokenizers.to_json(found))
    assert found.decode(found.encode_ordinary("e\u0301")) == "\u00e9"
    ids = found.encode(f"a{END}\u0338e\u0301", allowed_special="all")
    assert 256 in ids and found.decode(ids) == f"a{END}\u0338\u00e9"


def test_vocab_and_merges_of_old_folders(merges, tmp_path):
    values = tokenizer_json(merges, {END: 336})
    whole, _ = read(write_tokenizer(tmp_path, values), 337, 336)
    (tmp_path / "tokenizer.json").unlink()
    vocab = values["model"]["vocab"] | {END: 336}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *values["model"]["merges"], ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    old, _ = read(tmp_path, 337, 336)
    assert tokenizers.digest(old) == tokenizers.digest(whole)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CodeLlamaTokenizer"}')
    with pytest.raises(UserError, match="how a 'CodeLlamaTokenizer' cuts text is not known"):
        read(tmp_path, 337, 336)


def test_tokens_named_beside_the_file_are_added(tmp_path):
    write_tokenizer(tmp_path, tokenizer_json([], {END: 256}))
    about = {"added_tokens_decoder": {"257": {"content": "<|im_end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "added_tokens.json").write_text('{"<x>": 258}')
    found, _ = read(tmp_path, 300, 257)
    assert found.eot_token == 257 and found.encode("<x>", allowed_special="all") == [258]


def test_of_several_ends_the_first_is_taken_and_said(tmp_path):
    write_tokenizer(tmp_path, tokenizer_json([], {END: 256, "<|eot_id|>": 257}))
    found, told = read(tmp_path, 300, [257, 256])
    assert found.eot_token == 257 and END in told[0]


def without(values, name):
    return {k: v for k, v in values.items() if k != name}


def model(good, **changes):
    """A tokenizer.json with changes of its model."""
    return good | {"model": good["model"] | changes}


def words(good, **ids):
    """With ids of tokens that it has, or has not."""
    return model(good, vocab=good["model"]["vocab"] | ids)


def pairs(good, change):
    """With another list of pairs, which `change` makes of its own."""
    return model(good, merges=change(good["model"]["merges"]))


def added(good, **token):
    """With another special token alone."""
    return good | {"added_tokens": [{"id": 336, "content": END} | token]}


def cut(good, step):
    """With another way to cut text."""
    return good | {"pre_tokenizer": step}


def split(good, *, times=1, regex=r"\w+", behavior="Isolated"):
    """With text split by an expression first."""
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior}
    return cut(good, sequence(*[step] * times, use_regex=False))


SPACED = {"type": "ByteLevel", "add_prefix_space": True}
REFUSED = {  # what is done to a good tokenizer, and why it has no counterpart then
    "unigram": (lambda good: model(good, type="Unigram"), "type is 'Unigram'"),
    "dropout": (lambda good: model(good, dropout=0.1), "dropout is 0.1"),
    "byte fallback": (lambda good: model(good, byte_fallback=True), "byte_fallback"),
    "a normalizer": (lambda good: good | {"normalizer": {"type": "Lowercase"}}, "normalizer"),
    "a space before": (lambda good: cut(good, SPACED), "add_prefix_space"),
    "no cutting": (lambda good: cut(good, None), "pre_tokenizer"),
    "metaspace": (lambda good: cut(good, {"type": "Metaspace"}), "Metaspace"),
    "two splits": (lambda good: split(good, times=2), "expected ByteLevel alone"),
    "a removing split": (lambda good: split(good, behavior="Removed"), "Split is"),
    "a strange pattern": (split, "two engines"),
    "a pattern that fits nothing": (
        lambda good: split(good, regex="a|"),
        "where there is no character",
    ),
    "a pattern that is none": (lambda good: split(good, regex="(a"), "does not work"),
    "a pattern that repeats a choice": (
        lambda good: split(good, regex=rf"(?:{'|'.join(['[^x]'] * 10)})+(?=x)|\s|\S"),
        "repeats a group",
    ),
    "a repeated repetition": (
        lambda good: split(good, regex=r"(?:(?:a|a)+)+(?=x)|\s|\S"),
        "a group",
    ),
    "a counted group": (lambda good: split(good, regex=r"\\(?:a|a){2,9}(?=x)|\s|\S"), "a group"),
    "a pattern of many doubts": (
        lambda good: split(good, regex="[^x]?" * 30 + r"(?=x)|\s|\S"),
        "does not work",
    ),
    "a set that never ends": (lambda good: split(good, regex="[" + r"\p{L}" * 300), "two engines"),
    "another decoder": (
        lambda good: good | {"decoder": {"type": "WordPiece"}},
        "decoder is 'WordPiece'",
    ),
    "a greedy special": (lambda good: added(good, lstrip=True), "lstrip"),
    "no end": (
        lambda good: added(good, id=340, content="<pad>", special=True),
        "no special token ends a text",
    ),
    "too many ids": (lambda good: added(good, id=400, special=True), "the id 400"),
    "an end that is a word": (lambda good: added(good, id=300), "the id of another token"),
    "pairs in another order": (
        lambda good: pairs(good, lambda old: [old[1], old[0], *old[2:]]),
        "stands elsewhere",
    ),
    "a pair is missing": (
        lambda good: pairs(good, lambda old: old[:-1]),
        "joined from other halves",
    ),
    "a pair without an id": (lambda good: pairs(good, lambda old: [*old, "z z"]), "has no id"),
    "a pair twice": (lambda good: pairs(good, lambda old: old * 2), "a pair twice"),
    "no pairs": (lambda good: pairs(good, lambda old: ["a b c"]), "no pairs"),
    "a byte of a longer token is missing": (
        lambda good: model(good, vocab=without(good["model"]["vocab"], "h")),
        "holds a byte that has no token itself",
    ),
    "an id twice": (lambda good: words(good, **{"!": 5}), "an id twice"),
    "no bytes": (lambda good: words(good, 今=337), "spelled in bytes"),
    "an unreachable word": (lambda good: words(good, QXZ=337), "made by no pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_refused_with_the_reason(case, merges, tmp_path):
    spoil, reason = REFUSED[case]
    values = spoil(tokenizer_json(merges, {END: 336}))
    with pytest.raises(UserError, match=regex.escape(reason)) as caught:
        read(write_tokenizer(tmp_path, values), eos=336)
    assert str(caught.value).endswith(tokenizers_in.IDS_ONLY)


@pytest.mark.parametrize("name", ["byte", "bpe", "imported"])
def test_what_we_write_is_what_we_read(name, merges, tmp_path, text):
    """Exported and imported again: the same ids for any text."""
    if name == "imported":
        values = tokenizer_json(merges, {END: 0, "<a>": 1}, 2, normalizer={"type": "NFC"})
        ours, _ = read(write_tokenizer(tmp_path, values), eos=0)
    else:
        ours = tokenizers.create(name, lambda: [text.read_text()], 400)
    tokenizers_out.write(ours, tmp_path, 64)
    back, _ = read(tmp_path, ours.n_vocab, ours.eot_token)
    for sample in ("the cat sat on 今天的天气很好 \n\n  x 12345 'll", "e\u0301", ""):
        assert back.encode_ordinary(sample) == ours.encode_ordinary(sample)
    assert back.eot_token == ours.eot_token and back.n_vocab == ours.n_vocab


def test_the_standins_spell_bytes_as_we_do():
    assert standins.spell_bytes()[0] == bpe.SPELLING
