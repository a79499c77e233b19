"""Tokenizers: any text survives them, and a damaged file of one is refused."""

import json

import pytest
import standin_tokenizers
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data import tokenizers
from gpt.errors import UserError

CODE = ["def add(a, b):\n        return a + b\n\n" * 50, "今天的天气很好 été 🏳️‍🌈\n" * 50]
VALID = st.characters(exclude_categories=["Cs"])
WILD = st.text(VALID) | st.text(" \n\t\r'sd1a今\u0301") | st.just("<|endoftext|>")


def make(name: str, vocab_size: int = 400):
    return tokenizers.create(name, lambda: CODE, vocab_size)


BYTE, BPE, CHAR = make("byte"), make("bpe"), make("char")
KINDS = [BYTE, BPE, CHAR, tokenizers.IdTokenizer(9, 3)]


@pytest.mark.parametrize("kind", [BYTE, BPE], ids=lambda kind: kind.name)
@given(text=WILD)
@settings(max_examples=50)
def test_any_text_survives_byte_level_tokenizers(kind, text):
    ids = kind.encode_ordinary(text)
    assert kind.decode(ids) == text
    assert kind.decode_bytes(ids) == text.encode()
    assert kind.encode_ordinary_batch([text, text], num_threads=2) == [ids, ids]
    assert all(0 <= i < kind.n_vocab and i != kind.eot_token for i in ids)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_saved_tokenizer_is_the_same_and_every_id_decodes(kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.save(kind, path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    again = tokenizers.create(str(path), lambda: [], 0)
    assert (again.name, again.n_vocab, again.eot_token) == (kind.name, kind.n_vocab, kind.eot_token)
    assert tokenizers.digest(again) == tokenizers.digest(kind)
    ids = range(kind.n_vocab)
    assert [again.decode_bytes([i]) for i in ids] == [kind.decode_bytes([i]) for i in ids]
    if kind.name != "ids":
        encoded = kind.encode_ordinary_batch(CODE, num_threads=2)
        assert [again.encode_ordinary(text) for text in CODE] == encoded
        assert [kind.decode(one) for one in encoded] == CODE
        assert not any(kind.eot_token in one for one in encoded)
        assert kind.decode([kind.eot_token]) == "<|endoftext|>"


def test_digests_tell_tokenizers_apart_and_never_change():
    assert len({tokenizers.digest(kind) for kind in KINDS}) == len(KINDS)
    assert tokenizers.digest(make("bpe")) == tokenizers.digest(BPE)
    assert tokenizers.digest(make("bpe", 300)) != tokenizers.digest(BPE)
    on_any_machine = "39871c598d113fb12a70af40ef483be842b8de58177a3f94509e10b1a3e34288"
    assert tokenizers.digest(BYTE) == on_any_machine


def test_bpe_has_the_requested_number_of_ids_and_fewer_from_little_text():
    assert make("bpe", 257).n_vocab == 257
    assert (make("bpe", 300).n_vocab, make("bpe", 300).eot_token) == (300, 299)
    small = tokenizers.create("bpe", lambda: ["ab ab"], 10_000)
    assert small.n_vocab == 256 + 2 + 1  # ab, " ab", end-of-text
    with pytest.raises(UserError, match=r"vocab_size is 256.*257"):
        make("bpe", 256)


def test_characters_without_an_id_are_named_all_at_once():
    with pytest.raises(UserError, match=r"these characters: 'ß', '🎉'\. .*--tokenizer byte"):
        CHAR.encode_ordinary("aßa🎉ß")
    with pytest.raises(UserError, match="needs text"):
        tokenizers.create("char", lambda: [], 0)


@given(
    key=st.sampled_from(["format", "version", "pattern", "ranks", "special_tokens", "digest"]),
    value=st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()),
)
@settings(max_examples=20)
def test_a_saved_tokenizer_with_any_other_value_is_refused(key, value):
    with pytest.raises(UserError, match="saved tokenizer"):
        tokenizers.from_json(tokenizers.to_json(BYTE) | {key: value})


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\x00", b"{}", b"null"])
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*mine\.json"):
        tokenizers.create(str(path), lambda: [], 0)


def test_a_wrong_name_lists_the_right_ones(tmp_path):
    for name in ("gpt5", str(tmp_path)):
        with pytest.raises(UserError, match="byte, char, bpe, gpt2, cl100k_base, o200k_base"):
            tokenizers.create(name, lambda: [], 0)


@pytest.mark.parametrize("name", tokenizers.OPENAI_ENCODINGS)
def test_an_openai_encoding_has_no_gap_in_its_ids(name):
    made = standin_tokenizers.openai_encoding(name, BPE.tokens)
    n = len(BPE.tokens)
    assert (made.name, made.n_vocab, made.eot_token) == (name, n + 4, n + 1)
    names = f"<|unused_{n}|> <|endoftext|> <|unused_{n + 2}|> <|endofprompt|>"
    assert [made.decode([i]) for i in range(n, n + 4)] == names.split()
    assert tokenizers.from_json(tokenizers.to_json(made)).n_vocab == n + 4


@pytest.mark.parametrize("answer", [ConnectionError("no route"), b"<html>please log in</html>"])
def test_without_a_download_one_line_says_how_to_supply_it(answer, tmp_path, monkeypatch):
    def read_file(url):
        if isinstance(answer, bytes):
            return answer
        raise answer

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", read_file)
    with pytest.raises(UserError, match=r"set TIKTOKEN_CACHE_DIR to it; --tokenizer bpe") as caught:
        make("gpt2")
    assert "tiktoken.get_encoding('gpt2')" in str(caught.value)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


# Those of other programs: tokenizer.json, or vocab.json and merges.txt.


@pytest.mark.parametrize("form", ["GPT-2", "Llama 3", "TinyLlama", "Unigram"])
def test_a_tokenizer_json_trains_a_model_from_nothing(form, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(standin_tokenizers.make(form))
    found = tokenizers.create(str(tmp_path / "tokenizer.json"), lambda: (), 0)
    text = "the cat sat 今天"
    assert max(found.encode_ordinary(text)) < found.n_vocab
    end = {"GPT-2": "<|endoftext|>", "Llama 3": "<|end_of_text|>"}.get(form, "</s>")
    assert found.decode([found.eot_token]) == end
    # Another end is named as transformers does, and the folder may be given.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "t"}}))
    again = tokenizers.create(str(tmp_path), lambda: (), 0)
    assert again.decode([again.eot_token]) in ("t", " t")


def test_vocab_and_merges_are_gpt2s_tokenizer(tmp_path):
    whole = standin_tokenizers.make("GPT-2")
    model = json.loads(whole)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "tokenizer.json").write_bytes(whole)
    expected = tokenizers.load(tmp_path / "whole" / "tokenizer.json")
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        found = tokenizers.create(str(path), lambda: (), 0)
        for text in standin_tokenizers.WILD:
            assert found.encode_ordinary(text) == expected.encode_ordinary(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": '{"model": {}}'}, "tokenizer.json cannot be read"),
        ({"vocab.json": "{}"}, "no merges.txt"),
        ({"vocab.json": "{", "merges.txt": ""}, "cannot be read"),
    ],
)
def test_tokenizers_that_cannot_be_used(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        tokenizers.create(str(tmp_path), lambda: (), 0)
