"""5,000 damaged folders: each is refused in one sentence or gives finite weights."""

import contextlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import standins

from gpt.convert import incoming
from gpt.errors import UserError

SMALL = standins.GPT2 | {"vocab_size": 20, "n_positions": 8, "n_embd": 6, "n_layer": 1, "n_head": 2}
LLAMA = standins.LLAMA | {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 6}
LLAMA |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**60, 2**63, -(2**63), 10**30, 0.5, 1e308]
ODD = [*NUMBERS, None, True, "", "F16", "..", "gpt2", "llama", [], [1, 2], {}, {"a": 1}, [[]] * 3]
DEEP = b"[" * 5000 + b"]" * 5000


def flip(rng, data):
    """A few bytes, changed."""
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


def header(rng, data):
    """The header's JSON changed, its length told rightly."""
    n = int.from_bytes(data[:8], "little")
    text = json.dumps(change(rng, json.loads(data[8 : 8 + n]))).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def length(rng, data):
    """Another length of the header."""
    n = rng.choice([*(x for x in NUMBERS if 0 <= x < 2**64 and type(x) is int), len(data)])
    return n.to_bytes(8, "little") + data[8:]


def numbers(rng, data):
    """Some data replaced by the bits of NaN and infinity, or by noise."""
    at = rng.randrange(len(data) - 400, len(data) - 4)
    return data[:at] + rng.choice([b"\xff" * 4, b"\0\0\x80\x7f", rng.randbytes(4)]) + data[at + 4 :]


def fields(rng, data):
    return json.dumps(change(rng, json.loads(data))).encode()


MUTATIONS = [
    *[("model.safetensors", one) for one in (flip, cut, insert, header, header, length, numbers)],
    *[("config.json", one) for one in (flip, cut, insert, fields, fields, fields)],
]


@contextlib.contextmanager
def within(most):
    """What runs inside takes at most so many KiB more; its own peak, not that of tests before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: a process has but one peak in its life
        yield
        return
    before = peak()
    yield
    assert peak() - before < most, f"{peak() - before} KiB more memory for files of a few KiB"


def peak():
    """The most memory since it was last forgotten, KiB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def load(folder):
    """Every weight of a folder; what is not refused must be finite."""
    source, _ = incoming.open_source(folder)
    for path in source.leaves():
        assert np.isfinite(source.read(path)).all()


@pytest.mark.parametrize("c", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_each_damaged_folder_is_refused_or_finite(c, tmp_path):
    """2,500 of each family; bytes, headers, lengths, data and fields."""
    standins.write(tmp_path, c)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rng, refused = random.Random(0), 0
    with within(300_000):
        for _ in range(2500):
            name, mutate = rng.choice(MUTATIONS)
            (tmp_path / name).write_bytes(mutate(rng, whole[name]))
            try:
                load(tmp_path)
            except UserError as error:
                refused += 1
                assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
            (tmp_path / name).write_bytes(whole[name])
        load(tmp_path)
    assert 1500 < refused < 2500  # some mutations change what no function hears of
