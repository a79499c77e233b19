"""What the user asked for becomes a tokenizer and a dataset, or one clear refusal."""

import numpy as np
import pytest

from gpt.data import tokenizers
from gpt.data.dataset import load_dataset
from gpt.errors import UserError

TEXT = "hello world\n" * 50


def load(paths, tokenizer="byte", saved=None, expected=None, cache_dir=None, log=None):
    return load_dataset(
        paths,
        tokenizer,
        300,
        saved_tokenizer=saved,
        expected_fingerprint=expected,
        cache_dir=cache_dir,
        log=log or (lambda line: None),
    )


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    return tmp_path / "text"


def test_text_is_described_and_what_is_not_text_is_listed(text):
    (text / "photo.jpg").write_bytes(b"\xff\xd8")
    lines = []
    tokenizer, dataset = load([text], log=lines.append)
    assert tokenizer.decode([*dataset.train.array, *dataset.val.array]) == TEXT
    assert "1 file, 0.0 MB" in lines[0] and "--data PATH" not in lines[0]
    assert lines[1:] == ["skipped        1 file that is not text: text/photo.jpg"]


def test_an_earlier_runs_tokenizer_is_kept_and_its_text_must_be_the_same(text):
    tokenizer, dataset = load([text], "bpe")
    saved = tokenizers.to_json(tokenizer)
    again, same = load([text], "byte", saved, expected=dataset.fingerprint)
    assert tokenizers.digest(again) == saved["digest"]
    assert np.array_equal(same.train.array, dataset.train.array)
    (text / "a.txt").write_text(TEXT + "more")
    with pytest.raises(UserError, match="trained on other text"):
        load([text], "byte", saved, expected=dataset.fingerprint)


def test_prepared_tokens_bring_their_tokenizer_and_stand_alone(text, tmp_path):
    tokenizer, dataset = load([text], "bpe", cache_dir=tmp_path / "cache")
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    found, again = load([folder])
    assert tokenizers.digest(found) == tokenizers.digest(tokenizer)
    assert again.fingerprint == dataset.fingerprint
    with pytest.raises(UserError, match="name them alone"):
        load([folder, text])
    with pytest.raises(UserError, match="trained on other text"):
        load([folder], expected="0" * 64)
    (folder / "tokens.json").unlink()
    (folder / "tokenizer.json").unlink()
    for name in ("bpe", "char"):
        with pytest.raises(UserError, match="cannot be trained on tokens"):
            load([folder], name)


def test_a_cache_that_cannot_be_written_is_named(text):
    with pytest.raises(UserError, match=r"cannot write tokens to .*a\.txt"):
        load([text], cache_dir=text / "a.txt")
