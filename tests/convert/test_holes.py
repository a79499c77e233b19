"""Vocabularies with holes: an id that no token has, a byte that has no token."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_bpe import learn, plainly
from standins import tokenizer_json, write_tokenizer

from gpt.convert import bpe, tokenizers_in, tokenizers_out
from gpt.data import tokenizers
from gpt.errors import UserError

END = "<|endoftext|>"
MERGES = learn("the cat sat on the mat; 今天的天气很好 def f(x): return x + 123 " * 9, 40)
N_VOCAB = 400
WILD = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the cat!今天\n🙂"))
)


def read(folder):
    told = []
    config = {"model_type": "gpt2", "eos_token_id": 300}
    return tokenizers_in.read(folder, config, N_VOCAB, False, told.append), told


def test_an_id_that_nothing_has_moves_no_other(tmp_path):
    """A hole in the middle, as where a token was taken out of a vocabulary."""
    values = tokenizer_json(MERGES, {END: 300})
    vocab = {t: i + (i >= 40) for t, i in values["model"]["vocab"].items() if t != END}
    values["model"]["vocab"] = vocab
    found, _ = read(write_tokenizer(tmp_path, values))
    ids = {bpe.unspell(t): i for t, i in vocab.items()}
    text = "the cat 今天 (1)"
    assert found.encode_ordinary(text) == plainly(text, MERGES, ids)
    assert found.decode([40]) == "<|unused_40|>"


def test_bytes_without_a_token(tmp_path):
    """As in SmolLM2, whose text had no such bytes: a text with one is refused, others are not."""
    values = tokenizer_json(MERGES, {END: 300, "<!>": 301})
    ids = {bpe.unspell(t): i for t, i in values["model"]["vocab"].items()}
    values["model"]["vocab"] = {
        t: i
        for t, i in values["model"]["vocab"].items()
        if bpe.unspell(t) not in (b"!", b"\xc0", b"\xf0")
    }
    found, told = read(write_tokenizer(tmp_path, values))
    assert "no token for the bytes 21 c0 f0" in told[0]
    tokenizers_out.write(found, tmp_path, 64)
    back, _ = read(tmp_path)
    again = tokenizers.from_json(json.loads(json.dumps(tokenizers.to_json(found))))
    assert tokenizers.digest(found) == tokenizers.digest(back) == tokenizers.digest(again)
    for one in (found, again):
        assert one.n_vocab == 400 and one.encode("<!>", allowed_special="all") == [301]
        with pytest.raises(KeyError):
            one.decode([400])
        with pytest.raises(UserError, match="byte f0 of the character '🙂'"):
            one.encode("<!>🙂", allowed_special={"<!>"})
        with pytest.raises(UserError, match="byte 21 of the character '!'"):
            one.encode_ordinary_batch(["the", "the cat!"])

    @given(WILD)
    def check(text):
        if {0x21, 0xC0, 0xF0} & set(text.encode()):
            with pytest.raises(UserError, match=r"no token for the byte (21|f0)"):
                again.encode_ordinary(text)
        else:
            assert again.encode_ordinary(text) == plainly(text, MERGES, ids)
            assert again.decode(again.encode_ordinary(text)) == text

    check()
