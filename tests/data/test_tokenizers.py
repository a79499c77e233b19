"""Tokenizers: any text survives them, and a damaged file of one is refused."""

import base64
import json
from hashlib import sha1, sha256

import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gpt.data import tokenizers
from gpt.data.hf_tokenizer import CHARACTER_OF_BYTE
from gpt.errors import UserError

CODE = ["def add(a, b):\n        return a + b\n\n" * 50, "今天的天气很好 été 🏳️‍🌈\n" * 50]
WILD = st.text(st.characters()) | st.text(" \n\t\r'sd1a今\u0301") | st.just("<|endoftext|>")


def make(name: str, vocab_size: int = 400):
    return tokenizers.create(name, lambda: CODE, vocab_size)


BYTE, BPE, CHAR = make("byte"), make("bpe"), make("char")
KINDS = [BYTE, BPE, CHAR, tokenizers.IdTokenizer(9, 3)]
SINGLE_BYTES = [bytes([byte]) for byte in range(256)]


def rank_file(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))


@pytest.mark.parametrize("kind", [BYTE, BPE], ids=lambda kind: kind.name)
@given(text=WILD)
def test_any_text_survives_byte_level_tokenizers(kind, text):
    ids = kind.encode_ordinary(text)
    valid = tokenizers.without_lone_surrogates(text)
    assert kind.decode(ids) == valid
    assert kind.decode_bytes(ids) == valid.encode()
    assert kind.encode_ordinary_batch([text, text], num_threads=2) == [ids, ids]
    assert all(0 <= i < kind.n_vocab and i != kind.eot_token for i in ids)


@given(text=st.text("".join(sorted(set("".join(CODE))))))
@settings(max_examples=25)
def test_known_characters_survive_the_char_tokenizer(text):
    ids = CHAR.encode_ordinary(text)
    assert CHAR.decode(ids) == text and len(ids) == len(text)
    assert CHAR.encode_ordinary_batch([text, text], num_threads=2) == [ids, ids]
    assert CHAR.eot_token not in ids


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
        assert again.encode_ordinary_batch(CODE) == kind.encode_ordinary_batch(CODE)
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


def test_runs_of_spaces_in_code_become_one_token():
    indent = BPE.encode_ordinary("\n        return a")
    assert b"       " in [BPE.decode_bytes([i]) for i in indent]


def test_lone_surrogates_are_replaced_everywhere():
    for kind in (BYTE, BPE):
        assert kind.decode(kind.encode_ordinary("a\ud800b")) == "a\ufffdb"
    assert tokenizers.create("bpe", lambda: ["a\ud800b"], 300).n_vocab >= 257
    char = tokenizers.create("char", lambda: ["a\ud800"], 0)
    assert char.decode(char.encode_ordinary("\udfffa")) == "\ufffda"


def test_a_character_without_an_id_is_named():
    with pytest.raises(UserError, match="'ß' is not among the"):
        CHAR.encode_ordinary("aß")
    with pytest.raises(UserError, match="needs text"):
        tokenizers.create("char", lambda: [], 0)


@given(
    key=st.sampled_from(["format", "version", "pattern", "ranks", "special_tokens", "digest"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=3,
    ),
)
@settings(max_examples=40)
def test_a_saved_tokenizer_with_any_other_value_is_refused(key, value):
    with pytest.raises(UserError, match="saved tokenizer"):
        tokenizers.from_json(tokenizers.to_json(BYTE) | {key: value})


RIGHT = {
    "pattern": r"[\s\S]",
    "ranks": [base64.b64encode(byte).decode() for byte in SINGLE_BYTES],
    "special_tokens": {"<|endoftext|>": 256},
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pattern": "("}, "cannot be used: .*"),
        ({"pattern": r"\S+|\n"}, "survive"),
        ({"pattern": "(?!)"}, "survive"),
        ({"ranks": RIGHT["ranks"][1:]}, "a single byte has no token"),
        ({"ranks": [*RIGHT["ranks"], "QQ=="]}, "empty or there twice"),
        ({"ranks": [*RIGHT["ranks"], ""]}, "empty or there twice"),
        ({"ranks": [*RIGHT["ranks"], "é"]}, "cannot be used"),
        ({"special_tokens": {"<|endoftext|>": 10**6}}, "special ids leave a gap"),
        ({"special_tokens": {"<|endoftext|>": "256"}}, "special ids leave a gap"),
        ({"special_tokens": {"<|end|>": 256}}, "it lacks"),
    ],
)
def test_a_right_digest_does_not_save_a_wrong_tokenizer(changes, reason):
    def signed(body):
        digest = sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        header = {"format": "gpt tokenizer", "version": 1, "name": "x"}
        return header | body | {"digest": digest}

    assert tokenizers.from_json(signed(RIGHT)).n_vocab == 257
    with pytest.raises(UserError, match=f"saved tokenizer.*{reason}"):
        tokenizers.from_json(signed(RIGHT | changes))


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
    path = tmp_path / "mine.tiktoken"
    tokens = sorted(BPE.ranks, key=BPE.ranks.get)
    path.write_text(rank_file(tokens))
    assert tokenizers.digest(tokenizers.load(path)) == tokenizers.digest(BPE)
    path.write_text(rank_file(tokens[1:]))
    with pytest.raises(UserError, match="a single byte has no token"):
        tokenizers.load(path)
    path.write_text(rank_file(tokens).replace(" 7\n", " 8\n"))
    with pytest.raises(UserError, match="ranks are not 0, 1, 2"):
        tokenizers.load(path)


def test_a_text_that_the_pattern_cannot_split_is_refused():
    text = " " * 1_000_000 + "a"  # the libraries panic, which is no Exception
    with pytest.raises(UserError, match="a million spaces"):
        tokenizers.create("bpe", lambda: [text], 400)
    with pytest.raises(UserError, match="a million spaces"):
        BPE.encode_ordinary_batch([text], num_threads=2)


# ------------------------------------------------------------ OpenAI's encodings


@pytest.mark.parametrize("name", tokenizers.OPENAI_ENCODINGS)
def test_openai_encodings_are_described_as_tiktoken_describes_them(name, monkeypatch):
    files = {}

    def load_ranks(url, expected_hash):
        files.update(url=url, sha256=expected_hash)
        return {}

    def load_merges(vocab_bpe_file, encoder_json_file, vocab_bpe_hash, encoder_json_hash):
        return load_ranks(vocab_bpe_file, vocab_bpe_hash)

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load_ranks)
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", load_merges)
    theirs = openai_public.ENCODING_CONSTRUCTORS[name]()
    ours = tokenizers.OPENAI_ENCODINGS[name]
    assert files == {"url": ours.url, "sha256": ours.sha256}
    assert ours.pattern == theirs["pat_str"]
    assert ours.special_tokens == theirs["special_tokens"]


def test_gpt2s_merges_are_read_as_tiktoken_reads_them(monkeypatch):
    merges = "#version: 0.2\nĠ t\nh e\nĠt he\nÃ ©\n"
    spelled = [*CHARACTER_OF_BYTE.values(), "Ġt", "he", "Ġthe", "Ã©"]
    files = {"vocab": merges, "encoder": json.dumps({token: i for i, token in enumerate(spelled)})}
    monkeypatch.setattr(tiktoken.load, "read_file_cached", lambda url, _: files[url].encode())
    theirs = tiktoken.load.data_gym_to_mergeable_bpe_ranks("vocab", "encoder")
    ours = tokenizers.parse_gpt2_merges(merges)
    assert {token: rank for rank, token in enumerate(ours)} == theirs
    assert ours[-2:] == [b" the", "é".encode()]


def test_an_openai_encoding_is_downloaded_once_and_has_no_gap_in_its_ids(tmp_path, monkeypatch):
    content = rank_file(SINGLE_BYTES).encode()
    special = {"<|endoftext|>": 257, "<|endofprompt|>": 260}
    url = "https://example.org/small.tiktoken"
    small = tokenizers.OpenAIEncoding(url, sha256(content).hexdigest(), r"[\s\S]", special)
    monkeypatch.setitem(tokenizers.OPENAI_ENCODINGS, "cl100k_base", small)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "new"))
    downloads = []
    monkeypatch.setattr(tokenizers, "download", lambda url: downloads.append(url) or content)

    made = make("cl100k_base")
    assert (made.n_vocab, made.eot_token) == (261, 257)
    unused = "<|unused_256|> <|endoftext|> <|unused_258|> <|unused_259|> <|endofprompt|>"
    assert [made.decode([i]) for i in range(256, 261)] == unused.split()
    assert tokenizers.from_json(tokenizers.to_json(made)).n_vocab == 261

    assert tokenizers.digest(make("cl100k_base")) == tokenizers.digest(made)
    assert downloads == [url]
    (cached,) = (tmp_path / "new").iterdir()
    cached.write_bytes(content[:-1])  # damaged: it is downloaded again
    make("cl100k_base")
    assert downloads == [url, url] and cached.read_bytes() == content


@pytest.mark.parametrize("name", tokenizers.OPENAI_ENCODINGS)
@pytest.mark.parametrize("answer", [ConnectionError("no route"), b"<html>please log in</html>"])
def test_without_a_download_one_line_says_what_to_fetch_and_where_to_put_it(
    name, answer, tmp_path, monkeypatch
):
    def download(url):
        if isinstance(answer, bytes):
            return answer
        raise answer

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizers, "download", download)
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR to that folder") as caught:
        make(name)
    url = tokenizers.OPENAI_ENCODINGS[name].url
    assert f"save {url} as {sha1(url.encode()).hexdigest()}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_does_not_wait_forever(monkeypatch):
    def get(url, timeout):
        raise ConnectionError(max(timeout))

    monkeypatch.setattr("requests.get", get)
    with pytest.raises(ConnectionError, match="30"):
        tokenizers.download("https://example.org/x")
