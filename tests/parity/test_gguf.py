"""llama.cpp's own converter takes every form that we export, and finds our weights in it."""

import os
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import standin_tokenizers
import standins
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from gpt.convert.convert import export_model, import_model

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("transformers")

# The source of llama.cpp, where `make test-parity` puts it.
SOURCE = Path(os.environ.get("LLAMA_CPP", Path(sys.prefix, "llama.cpp")))
CONVERTER = SOURCE / "convert_hf_to_gguf.py"
# Each architecture that we export, and a form of tokenizer that such models have.
FORMS = {
    "gpt2": "GPT-2",
    "llama, biases": "TinyLlama",
    "llama 3": "Llama 3",
    "qwen2": "Qwen",
    "qwen3": "Qwen",
}


@pytest.fixture(scope="module")
def converter():
    """llama.cpp's program, run in this process, which has torch and transformers already."""
    if not CONVERTER.is_file():
        pytest.skip(f"no {CONVERTER}: make test-parity gets it, or set LLAMA_CPP to its folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SOURCE)
        patch.syspath_prepend(SOURCE / "gguf-py")
        # Only for tokenizer.model files, which we never write.
        unused = types.SimpleNamespace(SentencePieceProcessor=None)
        patch.setitem(sys.modules, "sentencepiece", unused)
        from conversion.base import TextModel

        # It recognizes the tokenizers of released models by hashes; those here are made up.
        patch.setattr(TextModel, "get_vocab_base_pre", lambda self, tokenizer: "gpt-2")

        def run(folder, out):
            patch.setattr(sys, "argv", [CONVERTER.name, str(folder), "--outfile", str(out)])
            runpy.run_path(str(CONVERTER), run_name="__main__")

        yield run


@pytest.mark.parametrize("kind", FORMS)
def test_llama_cpps_converter_takes_what_we_export(kind, converter, tmp_path):
    tokenizer = standin_tokenizers.make(FORMS[kind])
    n_vocab = Tokenizer.from_str(tokenizer.decode()).get_vocab_size()
    ids = {"vocab_size": n_vocab, "eos_token_id": n_vocab - 1, "bos_token_id": 0}
    theirs = standins.write(tmp_path / "theirs", standins.KINDS[kind] | ids)
    (theirs / "tokenizer.json").write_bytes(tokenizer)
    import_model(theirs, tmp_path / "run", False, str)
    export_model(tmp_path / "run", tmp_path / "ours", None, None, str)

    converter(tmp_path / "ours", tmp_path / "ours.gguf")

    import gguf

    made = gguf.GGUFReader(tmp_path / "ours.gguf")
    found = {tensor.name: tensor.data for tensor in made.tensors}
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    rotations = {"rope_freqs.weight"}  # computed from Llama 3's settings
    assert len(found.keys() - rotations) == len(ours)
    table = ours.get("transformer.wte.weight", ours.get("model.embed_tokens.weight"))
    assert np.allclose(found["token_embd.weight"], table, rtol=1e-3)  # in float16
    assert len(made.fields["tokenizer.ggml.tokens"].data) == n_vocab
