"""Tokenizers: any text survives them, and files of them are believed only when proved."""

import base64
import inspect
import json
import re
from hashlib import sha1

import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gpt.data import tokenizers
from gpt.data.tokenizers import encodings, saved
from gpt.errors import UserError

CODE = ["def add(a, b):\n        return a + b\n\n" * 50, "今天的天气很好 été 🏳️‍🌈\n" * 50]
WILD = st.text(st.characters()) | st.text(" \n\t\r'sd1a今\u0301") | st.just("<|endoftext|>")


def make(name: str, vocab_size: int = 400):
    return tokenizers.create(name, lambda: CODE, vocab_size)


BYTE_LEVEL = [make("byte"), make("bpe")]
KINDS = [*BYTE_LEVEL, make("char")]


def tampered(kind, **changes):
    """A saved tokenizer with some of its fields changed, its digest left as it was."""
    return json.loads(json.dumps(tokenizers.to_json(kind))) | changes


@pytest.mark.parametrize("kind", BYTE_LEVEL, ids=lambda kind: kind.name)
@given(text=WILD)
@settings(max_examples=200, deadline=None)
def test_any_text_survives_byte_level_tokenizers(kind, text):
    ids = kind.encode_ordinary(text)
    valid = tokenizers.without_lone_surrogates(text)
    assert kind.decode(ids) == valid
    assert kind.decode_bytes(ids) == valid.encode()
    assert kind.encode_ordinary_batch([text, text], num_threads=2) == [ids, ids]
    assert all(0 <= i < kind.n_vocab and i != kind.eot_token for i in ids)


@given(text=st.text("".join(sorted(set("".join(CODE))))))
def test_known_characters_survive_the_char_tokenizer(text):
    char = KINDS[-1]
    ids = char.encode_ordinary(text)
    assert char.decode(ids) == text and len(ids) == len(text)
    assert char.encode_ordinary_batch([text, text], num_threads=2) == [ids, ids]
    assert char.eot_token not in ids


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_id_decodes_and_end_of_text_is_one(kind):
    assert [kind.decode_bytes([i]) for i in range(kind.n_vocab)]
    assert kind.decode([kind.eot_token]) == "<|endoftext|>"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_saved_tokenizer_is_the_same(kind, tmp_path):
    tokenizers.save(kind, tmp_path / "tokenizer.json")
    again = tokenizers.load(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert again.name == kind.name and again.n_vocab == kind.n_vocab
    assert tokenizers.digest(again) == tokenizers.digest(kind)
    assert again.encode_ordinary_batch(CODE) == kind.encode_ordinary_batch(CODE)
    by_path = tokenizers.create(str(tmp_path / "tokenizer.json"), lambda: [], 0)
    assert tokenizers.digest(by_path) == tokenizers.digest(kind)


def test_digests_tell_tokenizers_apart_and_stay():
    assert len({tokenizers.digest(kind) for kind in KINDS}) == 3
    assert tokenizers.digest(make("bpe")) == tokenizers.digest(KINDS[1])
    assert tokenizers.digest(make("bpe", 300)) != tokenizers.digest(KINDS[1])
    on_any_machine = "39871c598d113fb12a70af40ef483be842b8de58177a3f94509e10b1a3e34288"
    assert tokenizers.digest(make("byte")) == on_any_machine


def test_bpe_has_the_asked_number_of_ids_and_fewer_from_little_text():
    assert make("bpe", 257).n_vocab == 257
    assert make("bpe", 300).n_vocab == 300
    assert make("bpe", 300).eot_token == 299
    small = tokenizers.create("bpe", lambda: ["ab ab"], 10_000)
    assert small.n_vocab == 256 + 2 + 1  # ab, " ab", end-of-text
    with pytest.raises(UserError, match=r"vocab_size is 256.*257"):
        make("bpe", 256)


def test_runs_of_spaces_in_code_become_one_token():
    indent = make("bpe").encode_ordinary("\n        return a")
    assert b"       " in [make("bpe").decode_bytes([i]) for i in indent]


def test_very_long_white_space_does_not_overflow_the_stack():
    long = " " * 1_000_000 + "x" + "\n " * 500_000 + "x"
    trained = tokenizers.create("bpe", lambda: [long, *CODE], 300)
    assert trained.decode(trained.encode_ordinary(long)) == long


def test_lone_surrogates_are_replaced_everywhere():
    for kind in BYTE_LEVEL:
        assert kind.decode(kind.encode_ordinary("a\ud800b")) == "a\ufffdb"
    assert tokenizers.create("bpe", lambda: ["a\ud800b"], 300).n_vocab >= 257
    char = tokenizers.create("char", lambda: ["a\ud800"], 0)
    assert char.decode(char.encode_ordinary("\udfffa")) == "\ufffda"


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match="'ß' is not among the"):
        KINDS[-1].encode_ordinary("aß")
    with pytest.raises(UserError, match="needs text"):
        tokenizers.create("char", lambda: [], 0)


HOSTILE = {
    "not a dict": [],
    "another format": tampered(KINDS[0], format="x"),
    "a later version": tampered(KINDS[0], version=2),
    "no name": tampered(KINDS[0], name=3),
    "no ranks": tampered(KINDS[0], ranks=None),
    "a rank twice": tampered(KINDS[0], ranks=["QQ=="] * 256),
    "a byte missing": tampered(
        KINDS[0],
        ranks=[base64.b64encode(bytes([b])).decode() for b in range(255)],
        special_tokens={"<|endoftext|>": 255},
    ),
    "an empty token": tampered(
        KINDS[0],
        ranks=[*tokenizers.to_json(KINDS[0])["ranks"], ""],
        special_tokens={"<|endoftext|>": 257},
    ),
    "no base64": tampered(KINDS[0], ranks=["é"]),
    "no text": tampered(KINDS[0], ranks=[7]),
    "special id taken": tampered(KINDS[0], special_tokens={"<|endoftext|>": 65}),
    "special id far away": tampered(KINDS[0], special_tokens={"<|endoftext|>": 10**9}),
    "special id no integer": tampered(KINDS[0], special_tokens={"<|endoftext|>": "256"}),
    "no end-of-text": tampered(KINDS[0], special_tokens={"<|end|>": 256}),
    "pattern of another type": tampered(KINDS[0], pattern=1),
    "pattern that is no regex": tampered(KINDS[0], pattern="("),
    "pattern that drops text": tampered(KINDS[0], pattern=r"[^\u07d0]+"),
    "pattern that drops spaces": tampered(KINDS[0], pattern=r"\S+|\n"),
    "pattern that is empty": tampered(KINDS[0], pattern=""),
    "pattern of a giant": tampered(KINDS[0], pattern="(?:a{1000}){1000}"),
    "another pattern": tampered(KINDS[1], pattern=r"[\s\S]"),
    "another digest": tampered(KINDS[1], digest="0" * 64),
    "no digest": tampered(KINDS[1], digest=None),
    "characters no string": tampered(KINDS[2], characters=["a"]),
    "characters twice": tampered(KINDS[2], characters="aab"),
    "no characters": tampered(KINDS[2], characters=""),
    "other characters": tampered(KINDS[2], characters="abc"),
    "surrogate characters": tampered(KINDS[2], characters="a\ud800"),
}


@pytest.mark.parametrize("values", HOSTILE.values(), ids=HOSTILE)
def test_a_wrong_file_is_refused(values):
    with pytest.raises(UserError, match="saved tokenizer"):
        tokenizers.from_json(values)


def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(saved, "SECONDS_TO_ENCODE", 0.3)
    slow = encodings.byte_level("x", r"(?=[\s\S]{0,9000}\x00Q)x|[\s\S]", BYTES)
    with pytest.raises(
        UserError, match=r"pattern does not work: .* characters took it over 0\.3 s"
    ):
        tokenizers.from_json(tokenizers.to_json(slow))


BYTES = [bytes([byte]) for byte in range(256)]
FORGED = {  # with a digest that is right
    "pattern that never matches": encodings.byte_level("x", r"(?!)", BYTES),
    "pattern that backtracks": encodings.byte_level("x", r"(a+)+$|(?=(a|aa)+b)c", BYTES),
    "pattern that drops a letter": encodings.byte_level("x", r"[^\u07d0]+", BYTES),
    "pattern that drops spaces": encodings.byte_level("x", r"\S+|\n", BYTES),
    "pattern that drops spaces at the end": encodings.byte_level("x", r"\s*\S+", BYTES),
    "a byte of a longer token is missing": encodings.byte_level(
        "x", r"[\s\S]", [*BYTES[1:], b"\0a"]
    ),
    "special id far away": encodings.byte_level("x", r"[\s\S]", BYTES, {"<|endoftext|>": 10**6}),
    "no end-of-text": encodings.byte_level("x", r"[\s\S]", BYTES, {"<|end|>": 256}),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_right_digest_does_not_save_a_wrong_tokenizer(forged):
    with pytest.raises(UserError, match=r"survive|special ids|lacks|holds a byte"):
        tokenizers.from_json(tokenizers.to_json(forged))


def test_a_text_at_which_a_pattern_backtracks_is_refused():
    """Rust panics there, and a panic is no Exception."""
    made = tokenizers.build("x", "b?" * 25 + r"b(?=x)|\s|\S", BYTES, {"<|endoftext|>": 256})
    with pytest.raises(UserError, match="cannot cut this text into pieces"):
        made.encode_ordinary("b" * 45)
    assert made.decode(made.encode_ordinary("bb x")) == "bb x"


def test_each_reason_for_refusal_is_its_own():
    """Not all refused for their digest alone: the checks before it see most of them."""
    reasons = set()
    for values in HOSTILE.values():
        with pytest.raises(UserError) as caught:
            tokenizers.from_json(values)
        reasons.add(re.sub(r"'.*'", "", str(caught.value)))
    by_digest = [reason for reason in reasons if "digest" in reason]
    assert len(by_digest) == 1 and len(reasons) >= 14


@given(json_value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8),
    key=st.sampled_from(sorted(tokenizers.to_json(KINDS[0]))))  # fmt: skip
def test_any_other_value_anywhere_is_refused(json_value, key):
    values = tokenizers.to_json(KINDS[0])
    if key != "name" and values[key] != json_value:
        with pytest.raises(UserError):
            tokenizers.from_json(values | {key: json_value})


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\x00", b"{}", b"null"])
@pytest.mark.parametrize("suffix", ["json", "tiktoken"])
def test_a_damaged_file_is_named(content, suffix, tmp_path):
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read the tokenizer .*mine.{suffix}"):
        tokenizers.create(str(path), lambda: [], 0)


def test_a_wrong_name_lists_the_right_ones(tmp_path):
    for name in ("gpt5", str(tmp_path), "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="byte, char, bpe, gpt2, cl100k_base, o200k_base"):
            tokenizers.create(name, lambda: [], 0)


def test_a_rank_file_is_read(tmp_path):
    ranks = tokenizers.to_json(KINDS[1])["ranks"]
    path = tmp_path / "mine.tiktoken"
    path.write_text("".join(f"{token} {rank}\n" for rank, token in enumerate(ranks)))
    assert tokenizers.digest(tokenizers.load(path)) == tokenizers.digest(KINDS[1])
    path.write_text("".join(f"{token} {rank}\n" for rank, token in enumerate(ranks[1:])))
    with pytest.raises(UserError, match="a single byte has no token"):
        tokenizers.load(path)
    path.write_text("".join(f"{token} {2 * rank}\n" for rank, token in enumerate(ranks)))
    with pytest.raises(UserError, match="ranks are not 0, 1, 2"):
        tokenizers.load(path)


@pytest.mark.parametrize("name", encodings.OPENAI_FILES)
def test_without_network_one_line_says_what_to_download_and_where_to_put_it(
    name, tmp_path, monkeypatch
):
    def offline(url):
        raise ConnectionError(url)

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(encodings, "download", offline)
    own = tiktoken.load.read_file
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as caught:
        tokenizers.create(name, lambda: [], 0)
    assert tiktoken.load.read_file is own
    urls = re.findall(r"https://\S+", inspect.getsource(getattr(openai_public, name)))
    urls = [url.strip('",') for url in urls]
    assert urls and all(
        f"{url} as {sha1(url.encode()).hexdigest()}" in str(caught.value) for url in urls
    )
    assert "\n" not in str(caught.value)


def test_downloads_do_not_wait_for_ever(monkeypatch):
    seen = {}

    def get(url, timeout):
        seen[url] = timeout
        raise ConnectionError

    monkeypatch.setattr("requests.get", get)
    with pytest.raises(ConnectionError):
        encodings.download("https://example.org/x")
    assert max(seen["https://example.org/x"]) <= 30


def test_an_openai_encoding_has_no_gap_in_its_ids(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    special = {"<|endoftext|>": 257, "<|endofprompt|>": 260}
    parts = {"name": "cl100k_base", "pat_str": r"[\s\S]", "mergeable_ranks": ranks}
    constructors = {"cl100k_base": lambda: parts | {"special_tokens": special}}
    monkeypatch.setattr(openai_public, "ENCODING_CONSTRUCTORS", constructors)
    kind = tokenizers.create("cl100k_base", lambda: [], 0)
    assert (kind.n_vocab, kind.eot_token) == (261, 257)
    assert [kind.decode([i]) for i in (256, 258, 259, 260)] == [
        "<|unused_256|>", "<|unused_258|>", "<|unused_259|>", "<|endofprompt|>",
    ]  # fmt: skip
    assert tokenizers.from_json(tokenizers.to_json(kind)).n_vocab == 261
