"""Tokenizers of other models: run and kept as they came. Ours: the same ids in the library."""

import itertools
import json

import pytest
import standin_tokenizers
import standins
from programs import succeed
from standin_tokenizers import N_VOCAB, WILD, make
from tokenizers import Tokenizer

import gpt
from gpt.convert.hf_tokenizer import export_tokenizer, import_tokenizer
from gpt.data import tokenizers
from gpt.data.hf_tokenizer import CHARACTER_OF_BYTE, HFTokenizer
from gpt.errors import UserError
from gpt.sampling.completion import TextStream

REVERSED = dict(zip(CHARACTER_OF_BYTE, reversed(CHARACTER_OF_BYTE.values()), strict=True))


def folder_with(folder, config=None, **files):
    """A folder with files, `tokenizer_json` standing for tokenizer.json; and its config.json."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("_json", ".json")).write_bytes(content)
    return folder, {"model_type": "llama"} | (config or {})


def read(folder, config, n_vocab=N_VOCAB, ids_only=False):
    told = []
    return import_tokenizer(folder, config, n_vocab, ids_only, told.append), told


@pytest.mark.parametrize("form", standin_tokenizers.FORMS)
def test_ids_and_texts_are_the_librarys(form, tmp_path):
    content = make(form)
    theirs = Tokenizer.from_str(content.decode())
    imported, _ = read(*folder_with(tmp_path, tokenizer_json=content))
    assert imported.n_vocab == N_VOCAB
    ours = tokenizers.from_json(json.loads(json.dumps(tokenizers.to_json(imported))))
    assert tokenizers.digest(ours) == tokenizers.digest(imported)
    assert ours.eot_token == imported.eot_token >= 0
    for text in WILD:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    theirs.encode_special_tokens = True
    ids = [theirs.encode(text, add_special_tokens=False).ids for text in WILD]
    assert ours.encode_ordinary_batch(WILD) == ids
    for text, one in zip(WILD, ids, strict=True):
        assert ours.encode_ordinary(text) == one
        whole = theirs.decode(one, skip_special_tokens=False)
        assert ours.decode(one) == whole
        # As it is streamed, token by token: whole characters, and the same text. Where the library
        # puts a space before a text it also takes it away again, which a piece cannot do.
        stream = TextStream(ours.decode_bytes)
        pieces = [stream.push([i]) for i in one] + [stream.finish()]
        assert "".join(pieces) in (whole, " " + whole)
    assert ours.decode_bytes([N_VOCAB - 1]) == f"<|unused_{N_VOCAB - 1}|>".encode()


def test_added_tokens_that_are_not_special_are_as_in_transformers(tmp_path):
    """Qwen's <think>: found in every text, and kept in what is decoded and exported."""
    content = make("Qwen")
    imported, _ = read(*folder_with(tmp_path, tokenizer_json=content))
    think = Tokenizer.from_str(content.decode()).token_to_id("<think>")
    for encode in (imported.encode, imported.encode_ordinary):
        assert think in encode("a <think>x")
    assert think in imported.encode_ordinary_batch(["<think>"])[0]
    assert imported.decode([think]) == "<think>" == imported.decode_bytes([think]).decode()


def test_files_come_and_go_byte_for_byte(tmp_path):
    """Through a run's folder, with what belongs to a tokenizer; all ends of a text are kept."""
    files = {
        "tokenizer_config_json": b'{"chat_template": "{{ x }}",\n "b": 1}',
        "special_tokens_map_json": {"eos_token": "<|eot_id|>"},
        "generation_config_json": {"eos_token_id": [401, N_VOCAB - 1], "temperature": 0.6},
        "chat_template.jinja": b"{% for m in messages %}\r\n{% endfor %}",
        "tokenizer_json": make("Llama 3"),
    }
    theirs = Tokenizer.from_str(make("Llama 3").decode())
    ends = [theirs.token_to_id("<|eot_id|>"), theirs.token_to_id("<|end_of_text|>")]
    ids = {"bos_token_id": theirs.token_to_id("<|begin_of_text|>"), "eos_token_id": ends}
    c = standins.LLAMA | {"vocab_size": N_VOCAB, "num_hidden_layers": 1} | ids
    folder_with(standins.write(tmp_path / "in", c), **files)
    done = succeed("gpt/convert/__main__", "import", tmp_path / "in", tmp_path / "run")
    assert "each of '<|eot_id|>', '<|end_of_text|>', " in done.err
    assert f", '<|unused_{N_VOCAB - 1}|>' ends a text" in done.err
    assert gpt.load(tmp_path / "run").tokenizer.eot_token == ends[0]
    done = succeed("gpt/convert/__main__", "export", tmp_path / "run", tmp_path / "out")
    for name in files:
        name = name.replace("_json", ".json")
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: values[name] for name in ids} == ids


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 3}, {}, [3]),
        ({"eos_token_id": [5, 3]}, {"eos_token_id": [3, 5, 6]}, [5, 3, 6]),
        ({"eos_token_id": 10**6}, {"eos_token_id": 4}, [4]),
        ({}, {}, None),
    ],
)
def test_every_end_of_a_text_is_known(config, generation, ends, tmp_path):
    theirs = make("GPT-2")
    vocabulary = Tokenizer.from_str(theirs.decode())
    ends = ends or [vocabulary.token_to_id(standin_tokenizers.END)]
    folder = folder_with(tmp_path, config, tokenizer_json=theirs, generation_config_json=generation)
    found, told = read(*folder)
    assert found.eot_token == ends[0]
    assert told == [] or all(repr(vocabulary.decode([i])) in told[0] for i in ends)
    assert len(told) == (len(ends) > 1)


REFUSED = {
    "not JSON": ({"tokenizer_json": b"[1"}, "tokenizer.json cannot be read"),
    "not UTF-8": ({"tokenizer_json": b'{"a": "\xff"}'}, "tokenizer.json cannot be read"),
    "no model": ({"tokenizer_json": {"version": "1.0"}}, "tokenizer.json cannot be read"),
    "SentencePiece": ({"tokenizer.model": b""}, r"no tokenizer\.json.*save_pretrained"),
    "old GPT-2": ({"vocab_json": {}, "merges.txt": b""}, r"no tokenizer\.json.*save_pretrained"),
    "too many ids": ({"tokenizer_json": make("GPT-2"), "n_vocab": 300}, "largest id"),
    "no end": (
        {"tokenizer_json": make("GPT-2").replace(b"<|endoftext|>", b"<|other|>")},
        "is known to end a text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_with_a_way_out(case, tmp_path):
    files, reason = REFUSED[case]
    n_vocab = files.pop("n_vocab", N_VOCAB)
    folder, config = folder_with(tmp_path, **files)
    with pytest.raises(UserError, match=reason) as caught:
        read(folder, config, n_vocab)
    assert str(caught.value).endswith("; --ids-only imports the model without its tokenizer")
    found, told = read(folder, config | {"eos_token_id": 7}, n_vocab, ids_only=True)
    assert isinstance(found, tokenizers.IdTokenizer) and found.eot_token == 7 and told


def make_ours(name):
    """One of our tokenizers; OpenAI's encodings have a trained BPE's tokens."""
    if name not in tokenizers.OPENAI_ENCODINGS:
        return tokenizers.create(name, lambda: standin_tokenizers.TEXT, 500)
    return standin_tokenizers.openai_encoding(name, make_ours("bpe").tokens)


@pytest.mark.parametrize("name", ["byte", "char", "bpe", *tokenizers.OPENAI_ENCODINGS])
def test_our_own_go_out_as_a_tokenizer_json(name, tmp_path):
    ours = make_ours(name)
    for file, content in export_tokenizer(ours, 64).items():
        (tmp_path / file).write_bytes(content)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    back, told = read(tmp_path, {"model_type": "gpt2"}, ours.n_vocab)
    assert (back.eot_token, back.n_vocab, told) == (ours.eot_token, ours.n_vocab, [])
    for text in standin_tokenizers.TEXT if name == "char" else WILD:
        ids = ours.encode_ordinary(text)
        assert back.encode_ordinary(text) == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.encode(tokenizers.END_OF_TEXT).ids == [ours.eot_token]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"]
    assert export_tokenizer(back, 64) == back.files


def test_tokens_that_no_lower_ones_make_go_out_as_well():
    """As 21 of Llama 3's, and one that overlaps itself."""
    tokens = [b"ab", b"ba", b"baab", b"aba", b"abba", b"abbab", b"zzz"]
    ours = tokenizers.ByteLevelTokenizer("x", r"\S+|\s+", [*tokenizers.SINGLE_BYTES, *tokens])
    back = HFTokenizer(export_tokenizer(ours, 64), ours.n_vocab, {}, ours.eot_token)
    letters = ("".join(word) for n in range(9) for word in itertools.product("ab", repeat=n))
    texts = [*letters, "zzz zzzz azzz"]
    assert back.encode_ordinary_batch(texts) == ours.encode_ordinary_batch(texts)


def test_a_tokenizer_that_would_give_other_ids_is_not_exported(monkeypatch):
    monkeypatch.setattr("gpt.convert.hf_tokenizer.CHARACTER_OF_BYTE", REVERSED)
    with pytest.raises(UserError, match="cannot be exported"):
        export_tokenizer(tokenizers.create("byte", lambda: (), 0), 64)
