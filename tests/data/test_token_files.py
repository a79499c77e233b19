"""Token files say what they are, or are refused: our own, llm.c's, modded-nanogpt's, nanoGPT's."""

import json

import numpy as np
import pytest
from data_files import BYTE, tokenize

from gpt.data import token_files, tokenizers
from gpt.data.sources import expand
from gpt.data.token_files import Tokens, find_shards, open_others, open_shards
from gpt.errors import UserError

LARGE = tokenizers.IdTokenizer(70_000, 69_999)


@pytest.fixture
def prepared(tmp_path):
    """A folder of our tokens."""
    (tmp_path / "text.txt").write_text("hello world " * 20)
    return tokenize(tmp_path / "text.txt", tmp_path / "tokens")


def test_shards_are_sliced_as_one_array():
    whole = np.arange(100, dtype=np.uint16)
    shards = Tokens([whole[:30], whole[30:31], whole[31:]], 100)
    for start, stop in ((0, 100), (29, 32), (30, 31), (0, 30), (31, 90), (5, 5), (90, 200)):
        assert shards[start:stop].tolist() == whole[start:stop].tolist()
    assert len(shards) == 100 and shards[:].tolist() == whole.tolist()


def test_prepared_shards_are_opened_with_their_own_tokenizer(prepared):
    own = tokenizers.load(prepared / "tokenizer.json")
    assert len(open_shards(prepared, own)["val"]) == 24
    char = tokenizers.create("char", lambda: ["helo wrd"], 0)
    with pytest.raises(UserError, match=r"another tokenizer: pass --tokenizer .*tokenizer.json"):
        open_shards(prepared, char)


def test_a_wrong_header_is_refused(prepared):
    path = prepared / "tokens.json"
    for content in ("[]", "{", json.dumps(json.loads(path.read_text()) | {"version": 1})):
        path.write_text(content)
        with pytest.raises(UserError, match="damaged: delete the folder"):
            open_shards(prepared, BYTE)


def test_truncated_changed_or_missing_token_files_are_refused(prepared):
    (path,) = prepared.glob("val*.bin")
    whole = path.read_bytes()
    for content in (whole[:-2], whole[:-1], b"", whole + whole):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"val-00000\.bin"):
            open_shards(prepared, BYTE)
    path.write_bytes(whole[::-1])
    open_shards(prepared, BYTE)
    with pytest.raises(UserError, match=r"val-00000\.bin has changed"):
        open_shards(prepared, BYTE, verify=True)
    path.unlink()
    with pytest.raises(UserError, match=r"val-00000\.bin"):
        open_shards(prepared, BYTE)


def write_ids(path, ids, dtype="<u2", magic=None, version=1, count=None):
    """A shard: of llm.c's form with `magic`, else nanoGPT's."""
    header = b""
    if magic is not None:
        numbers = [magic, version, len(ids) if count is None else count]
        header = np.array(numbers + [0] * 253, "<i4").tobytes()
    path.write_bytes(header + np.array(ids, dtype).tobytes())
    return path


def ids_of(tokens):
    return tokens[:].tolist()


def test_nanogpts_headerless_files_are_read(tmp_path):
    ids = {"train": [104, 105, 256, 104] * 100, "val": [104, 105] * 20}
    for split, tokens in ids.items():
        write_ids(tmp_path / f"{split}.bin", tokens)
    for other in ("meta.pkl", "input.txt", "prepare.py"):  # as they stand beside them
        (tmp_path / other).write_bytes(b"\x80\x04\x95")
    data, fingerprint = open_others(find_shards([tmp_path]), BYTE, None)
    assert ids_of(data["train"]) == ids["train"] and ids_of(data["val"]) == ids["val"]
    assert data["train"].n_bytes + data["val"].n_bytes == 340  # end-of-text is no text
    write_ids(tmp_path / "val.bin", [*ids["val"][:-1], 106])
    assert open_others(find_shards([tmp_path]), BYTE, None)[1] != fingerprint
    write_ids(tmp_path / "val.bin", [104, 257])
    with pytest.raises(UserError, match=r"val\.bin holds token 257, but byte has only 257"):
        open_others(find_shards([tmp_path]), BYTE, None)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<u8"])
def test_the_type_of_headerless_ids_is_found(dtype, tmp_path):
    path = write_ids(tmp_path / "train.bin", [104, 0, 256, 7] * 100, dtype)
    data, _ = open_others([path], BYTE, None)
    assert ids_of(data["train"]) == [104, 0, 256, 7] * 95
    assert ids_of(data["val"]) == [104, 0, 256, 7] * 5


def test_a_large_vocabulary_decides_the_type(tmp_path):
    ids = [69_000, 3, 65_536, 12] * 50
    data, _ = open_others([write_ids(tmp_path / "train.bin", ids, "<u4")], LARGE, None)
    assert ids_of(data["train"]) + ids_of(data["val"]) == ids
    # Ids of 16 bits in pairs are far beyond any vocabulary.
    path = write_ids(tmp_path / "train.bin", [700, 300, 65_000, 12] * 50)
    with pytest.raises(UserError, match=r"holds token \d+, but ids has only 70000"):
        open_others([path], LARGE, None)
    path.write_bytes(b"abc")
    with pytest.raises(UserError, match="is 3 bytes long: expected uint16 tokens"):
        open_others([path], BYTE, None)


def test_shards_of_llmc_and_modded_nanogpt(tmp_path):
    for i in range(3):
        write_ids(tmp_path / f"fineweb_train_{i:06}.bin", [i, 1, 2, 3] * 10, magic=20240520)
    write_ids(tmp_path / "fineweb_val_000000.bin", [9] * 6, magic=20240520)
    data, _ = open_others(find_shards([tmp_path]), BYTE, None)
    assert ids_of(data["train"])[38:42] == [2, 3, 1, 1] and len(data["train"]) == 120
    assert ids_of(data["val"]) == [9] * 6
    wide = write_ids(tmp_path / "x_train.bin", [69_000, 1], "<u4", magic=20240801, version=7)
    assert ids_of(open_others([wide], LARGE, 0)[0]["train"]) == [69_000, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 of llm.c's tokens: expected version 1"),
        ({"count": 7}, "damaged: it holds 40 tokens, but its header says 7"),
        ({"magic": 20240801}, "version 1 of llm.c's tokens: expected version 7"),
        ({"ids": [300] * 40}, "holds token 300, but byte has only 257"),
        ({"ids": []}, "1024 bytes long: expected uint16 tokens"),
    ],
)
def test_damaged_shards_are_refused(change, message, tmp_path):
    given = {"ids": [1, 2, 3, 4] * 10, "magic": 20240520} | change
    path = write_ids(tmp_path / "train.bin", **given)
    with pytest.raises(UserError, match=message):
        open_others([path], BYTE, None)


def test_which_paths_are_token_shards(tmp_path):
    (tmp_path / "words.bin").write_text("only text")
    assert find_shards([tmp_path / "words.bin"]) == find_shards([tmp_path]) == []
    shard = write_ids(tmp_path / "any_name.bin", [1, 2])
    assert find_shards([shard]) == [shard] and find_shards([tmp_path]) == []
    assert find_shards(expand([tmp_path / "*_name.bin"])) == [shard]


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(None, 0, "<u2"), (None, 0, "<u4"), (20240520, 1, "<u2")]
)
def test_of_a_large_file_little_is_read(magic, version, dtype, tmp_path, monkeypatch):
    """2^26 tokens: the file is sparse, and neither hashed nor copied as a whole."""
    size = 2**26 + 3
    bytes_each = np.dtype(dtype).itemsize
    path = write_ids(tmp_path / "train.bin", [*range(200)] * 1000, dtype, magic, version, size)
    before = 0 if magic is None else token_files.LLMC_HEADER
    with path.open("r+b") as file:
        file.truncate(before + bytes_each * size)
    read = []
    sample = token_files.take_sample
    monkeypatch.setattr(
        token_files, "take_sample", lambda a: read.append(len(sample(a))) or sample(a)
    )
    data, _ = open_others([path], BYTE, None)
    assert len(data["train"]) + len(data["val"]) == size and sum(read) < 2**22
    with path.open("r+b") as file:
        file.seek(before + bytes_each * (size // 126))
        file.write(np.array([60_000], dtype).tobytes())
    open_others([path], BYTE, None)
    with pytest.raises(UserError, match="holds token 60000"):
        open_others([path], BYTE, None, verify=True)
