"""Damaged folders: each is refused in one sentence, or still gives finite weights and a text."""

import json
import random

import jax
import numpy as np
import pytest
import standins
from standin_tokenizers import N_VOCAB, make

from gpt.convert import convert
from gpt.convert.hf_tokenizer import import_tokenizer
from gpt.errors import UserError

SMALL = {"vocab_size": N_VOCAB, "n_positions": 8, "n_embd": 6, "n_layer": 1, "n_head": 2}
LLAMA = {"vocab_size": N_VOCAB, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}
FOLDERS = {"gpt2": (standins.GPT2 | SMALL, "GPT-2"), "llama": (standins.LLAMA | LLAMA, "TinyLlama")}
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**60, 2**63, -(2**63), 10**30, 0.5, 1e308]
ODD = [*NUMBERS, None, True, "", "F16", "..", "gpt2", "llama", [], [1, 2], {}, {"a": 1}, [[]] * 3]
DEEP = b"[" * 5000 + b"]" * 5000


def flip(rng, data):
    """A few bytes changed."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def insert(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + rng.choice([b"\0" * 9, b'"', b"{", b"9" * 400, DEEP, b"\xff"]) + data[at:]


def change(rng, value):
    """One place in a JSON value replaced, dropped, or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        new = {k: change(rng, v) if k == name else v for k, v in value.items()}
        if rng.random() < 0.2:
            moved = new.pop(name)
            if rng.random() < 0.5:
                new[rng.choice([name + "x", "../" + name, "n_layer", "a" * 300, ""])] = moved
        return new
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [change(rng, v) if k == i else v for k, v in enumerate(value)]
    if type(value) is int and rng.random() < 0.4:
        return value + rng.choice([-4, -1, 1, 4])
    return rng.choice(ODD)


def fields(rng, data):
    return json.dumps(change(rng, json.loads(data))).encode()


def header(rng, data):
    """A safetensors header changed, with the right length."""
    n = int.from_bytes(data[:8], "little")
    text = fields(rng, data[8 : 8 + n])
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def length(rng, data):
    """Another length of the header."""
    n = rng.choice([*(x for x in NUMBERS if type(x) is int and 0 <= x < 2**64), len(data)])
    return n.to_bytes(8, "little") + data[8:]


def numbers(rng, data):
    """Some weights replaced by NaN, infinity, or noise."""
    at = rng.randrange(len(data) - 400, len(data) - 4)
    return data[:at] + rng.choice([b"\xff" * 4, b"\0\0\x80\x7f", rng.randbytes(4)]) + data[at + 4 :]


MUTATIONS = [
    *[("model.safetensors", one) for one in (flip, cut, insert, header, header, length, numbers)],
    *[("config.json", one) for one in (flip, cut, insert, fields, fields, fields)],
    ("tokenizer.json", cut),  # what else is in it is its library's matter
]


def load(folder):
    """All of a folder; what is not refused must be finite, and encode a text."""
    model = convert.open_model(folder)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(model.read_params()))
    values = model.values | {"eos_token_id": 0}
    letters = import_tokenizer(folder, values, model.config.vocab_size, False, str)
    letters.decode_bytes(letters.encode_ordinary("the cat 今天"))


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FOLDERS)
def test_a_damaged_folder_is_refused_or_sound(family, n, tmp_path):
    """Bytes, lengths, headers, fields and numbers, at random."""
    c, form = FOLDERS[family]
    standins.write(tmp_path, c)
    (tmp_path / "tokenizer.json").write_bytes(make(form))
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rng, refused = random.Random(0), 0
    for _ in range(n):
        name, mutate = rng.choice(MUTATIONS)
        (tmp_path / name).write_bytes(mutate(rng, whole[name]))
        try:
            load(tmp_path)
        except UserError as error:
            refused += 1
            assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
        (tmp_path / name).write_bytes(whole[name])
    load(tmp_path)
    assert 0.5 * n < refused < n  # some mutations change what no function depends on
