"""safetensors files: what the library writes is read, and the reverse; damage is refused."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt.convert import strict_json, tensorfile
from gpt.errors import UserError

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def write(path, header, data=b"", length=None):
    """A file with that header, which may claim another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_library_writes_is_read(dtype, tmp_path):
    arrays = {f"x.{n}": np.arange(n * 3).reshape(3, n).astype(DTYPES[dtype]) for n in (1, 2, 5)}
    save_file(arrays, tmp_path / "a.safetensors", {"format": "pt"})
    found = tensorfile.open_file(tmp_path / "a.safetensors")
    assert {name: one.dtype for name, one in found.items()} == dict.fromkeys(arrays, dtype)
    for name, array in arrays.items():
        assert found[name].map().tobytes() == array.tobytes()
        assert found[name].map().shape == array.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_we_write_the_library_reads(dtype, tmp_path):
    arrays = {"a": np.eye(3), "b.c": np.arange(4.0), "d": np.array(2.0).reshape(1, 1)}
    shapes = {name: array.shape for name, array in arrays.items()}
    tensorfile.write_file(tmp_path / "a.safetensors", shapes, dtype, arrays.values())
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == DTYPES[dtype] and np.array_equal(found[name], array)


DAMAGED = {
    "empty": b"",
    "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "cut short in the header": struct.pack("<Q", 100) + b'{"a":',
    "no JSON": struct.pack("<Q", 4) + b"nope",
    "not UTF-8": struct.pack("<Q", 4) + b'"\xff"}',
    "nested without end": struct.pack("<Q", 200_000) + b"[" * 200_000,
}
WRONG = {
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
    "past the end": ({"a": entry(0, 16)}, 12),
    "data left over": ({"a": entry(0, 8)}, 12),
    "cut short in the data": ({"a": entry(0, 12)}, 8),
    "backwards": ({"a": entry(8, 0, [1])}, 8),
    "below zero": ({"a": entry(-4, 4, [2])}, 4),
    "shape and place differ": ({"a": entry(0, 8, [3])}, 8),
    "a shape beyond counting": ({"a": entry(0, 8, [2**62, 4])}, 8),
    "a shape of many axes": ({"a": entry(0, 4, [1] * 9)}, 4),
    "a truth for a size": ({"a": entry(0, 4, [True])}, 4),
    "a fraction for a size": ({"a": entry(0, 4, [1.0])}, 4),
    "an unknown type": ({"a": entry(0, 4, [1], "F33")}, 4),
    "a type that is a list": ({"a": entry(0, 4, [1], ["F32"])}, 4),
    "a name that climbs": ({"../a": entry(0, 4)}, 4),
    "a name with dots": ({"a..b": entry(0, 4)}, 4),
    "a name without letters": ({"": entry(0, 4)}, 4),
    "no object": ({"a": 3}, 0),
    "one field too many": ({"a": entry(0, 4) | {"run": "me"}}, 4),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "a": entry(0, 4)}, 4),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors"):
        tensorfile.open_file(path)


@pytest.mark.parametrize(("header", "n_bytes"), WRONG.values(), ids=WRONG)
def test_a_header_that_does_not_fit_is_refused(header, n_bytes, tmp_path):
    with pytest.raises(UserError, match=r"a\.safetensors"):
        tensorfile.open_file(write(tmp_path / "a.safetensors", header, bytes(n_bytes)))


def test_the_header_that_fits_is_taken(tmp_path):
    header = {
        "__metadata__": {"a": "b"},
        "a": entry(0, 8),
        "b": entry(8, 8, [0]),
        "c": entry(8, 12),
    }
    found = tensorfile.open_file(write(tmp_path / "a.safetensors", header, bytes(12)))
    assert list(found) == ["a", "b", "c"]


def test_a_name_twice_and_no_numbers_are_refused():
    for text in (
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        "[1]",
        '{"a": ' + "9" * 5000 + "}",
    ):
        with pytest.raises(UserError):
            strict_json.parse(text.encode(), "it")


def test_a_json_file_may_not_be_large(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "' + "b" * 100 + '"}')
    with pytest.raises(UserError, match="at most 50"):
        strict_json.read(tmp_path / "a.json", 50)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("read", [tensorfile.open_file, strict_json.read])
def test_a_pipe_is_not_waited_for(make, read, tmp_path):
    make(tmp_path / "a")
    with pytest.raises(UserError, match="it is no file"):
        read(tmp_path / "a")


def make_shards(folder, index):
    for i, name in enumerate("ab"):
        write(folder / f"{name}.safetensors", {f"t{i}": entry(0, 4)}, bytes(4))
    (folder / tensorfile.INDEX).write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    ("index", "reason"),
    {
        "a file elsewhere": ({"t0": "../a.safetensors"}, "beside it"),
        "a name of two lines": ({"t0": "a.safetensors", "x\ny": "a.safetensors"}, "beside it"),
        "an absolute one": ({"t0": "/a.safetensors"}, "beside it"),
        "a pickle": ({"t0": "a.bin"}, "beside it"),
        "a number": ({"t0": 1}, "beside it"),
        "one not named": ({"t0": "a.safetensors", "t1": "a.safetensors"}, "no file has: t1"),
        "exchanged": ({"t0": "b.safetensors", "t1": "a.safetensors"}, "the index puts in"),
        "one too many": ({"t0": "a.safetensors", "x": "a.safetensors"}, "no file has: x"),
        "absent": ({"t0": "c.safetensors"}, "cannot be read"),
        "empty": ({}, "no weight_map"),
        "a list": ([1], "no weight_map"),
    }.values(),
)
def test_an_index_that_does_not_fit_is_refused(index, reason, tmp_path):
    make_shards(tmp_path, index)
    with pytest.raises(UserError, match=reason):
        tensorfile.open_folder(tmp_path)


def test_shards_are_read_together(tmp_path):
    make_shards(tmp_path, {"t0": "a.safetensors", "t1": "b.safetensors"})
    assert sorted(tensorfile.open_folder(tmp_path)) == ["t0", "t1"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_with_how_to_convert_it(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"pickle.*save_pretrained"):
            tensorfile.open_folder(source)


def test_what_is_no_folder_of_a_model_is_refused(tmp_path):
    for path, reason in ((tmp_path / "absent", "no folder"), (tmp_path, "holds neither")):
        with pytest.raises(UserError, match=reason):
            tensorfile.open_folder(path)
