"""The tokenizer files that we write, read by AutoTokenizer: the same ids for any text."""

import json

import pytest

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import standin_tokenizers  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from gpt.convert.hf_tokenizer import export_tokenizer, import_tokenizer  # noqa: E402
from gpt.data import tokenizers  # noqa: E402

PIECES = ["the", "'LL", " 1234", "今天", "🙂", "\u200d", "é", "\n\n", "   ", "\t", "\r", "<|", "▁"]
WILD = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs", "Cn"])))
).map("".join)


def write(files, folder):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("form", ["GPT-2", "Llama 3", "SmolLM2", "Qwen", "TinyLlama", "Gemma"])
def test_a_tokenizer_that_came_in_goes_out_the_same(form, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": standin_tokenizers.make(form),
        "tokenizer_config.json": json.dumps(about).encode(),
    }
    theirs = write(files, tmp_path / "in")
    ours = import_tokenizer(
        tmp_path / "in", {"model_type": "llama"}, standin_tokenizers.N_VOCAB, False, str
    )
    back = write(export_tokenizer(ours, 64), tmp_path / "out")

    @given(WILD)
    def check(text):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids == back(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)

    check()


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_our_own_tokenizers_there(name, tmp_path):
    ours = tokenizers.create(name, lambda: standin_tokenizers.TEXT, 600)
    there = write(export_tokenizer(ours, 64), tmp_path)

    @given(WILD)
    def check(text):
        assert there(text)["input_ids"] == ours.encode_ordinary(text)
        assert there.decode(ours.encode_ordinary(text)) == text

    check()
    assert there.eos_token_id == ours.eot_token and len(there) == ours.n_vocab


def test_characters_there(tmp_path):
    ours = tokenizers.create("char", lambda: ["the cat 今天\n"], 0)
    there = write(export_tokenizer(ours, 64), tmp_path)
    text = "今天 the cat\n\ntat"
    assert there(text)["input_ids"] == ours.encode_ordinary(text)
    assert there.decode(ours.encode_ordinary(text)) == text
