"""Folders that transformers saved, imported; folders that we export, loaded by transformers."""

import json
import re

import jax
import numpy as np
import pytest
import standin_tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gpt.convert.hf_tokenizer import export_tokenizer, import_tokenizer
from gpt.data import tokenizers

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import programs  # noqa: E402
import standins  # noqa: E402
from programs import succeed  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import gpt  # noqa: E402
from gpt.config import TrainConfig  # noqa: E402
from gpt.convert.convert import open_model  # noqa: E402
from gpt.data.tokenizers import IdTokenizer  # noqa: E402
from gpt.model import transformer  # noqa: E402
from gpt.sampling import generate  # noqa: E402
from gpt.sampling.language_model import LanguageModel  # noqa: E402
from gpt.sampling.settings import Settings  # noqa: E402
from gpt.training import step_functions  # noqa: E402

forward = jax.jit(transformer.forward, static_argnums=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """torch's threads wait for each other longer than such small products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def convert(*argv):
    succeed("gpt/convert/__main__", *argv)


def token_ids(config, rows, length, seed=1):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length))


def bits(folder):
    """Every tensor of a folder, by name: type, shape and bits."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {n: (str(a.dtype), a.shape, a.tobytes()) for n, a in load_file(path).items()}
    return found


def load(folder, **options):
    options |= {"attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def read(folder):
    """Our config and stacked weights of a folder that transformers has saved."""
    model = open_model(folder)
    params = model.read_params()
    expected = transformer.abstract(model.config)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, params, expected)
    assert all(jax.tree.leaves(same))
    return model.config, params


def greedy(model, prompt: list[int], n: int) -> list[int]:
    """The `n` tokens that transformers finds likeliest after `prompt`, one by one."""
    ids = torch.tensor([prompt])
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
    )
    return done[0, len(prompt) :].tolist()


def logits_of(model, ids):
    """transformers' logits of a batch of token ids."""
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def agree(ours, theirs):
    assert theirs.std() > 0.2, "logits so flat that they would agree by themselves"
    assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(theirs).max())


# The hub's own config.json, made small, and each family with what may differ in it.
CONFIGS = {name: standins.small(c) for name, c in standins.HUB.items()} | standins.KINDS
NO_IDS = {"bos_token_id": None, "eos_token_id": None}  # a text has no end


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name, tmp_path):
    """The same logits here, and the same bits and logits in what we give back."""
    model = load(standins.write(tmp_path / "made", CONFIGS[name]), dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    config, params = read(tmp_path / "theirs")
    ids = token_ids(config, 2, 64)
    expected = logits_of(model, ids)
    agree(forward(config, params, ids), expected)

    convert("import", tmp_path / "theirs", tmp_path / "run")
    convert("export", tmp_path / "run", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(tmp_path / "theirs")
    loaded = load(tmp_path / "back")
    assert np.array_equal(logits_of(loaded, ids), expected)
    about = json.loads((tmp_path / "back/config.json").read_text())
    assert about["architectures"] == [type(loaded).__name__]


SAME = {name: standins.KINDS[name] for name in ("gpt2", "llama 3", "qwen2", "qwen3")}
SAME["gpt2's width"] = standins.GPT2 | {"vocab_size": 50257, "n_embd": 768, "n_head": 12}


@pytest.mark.parametrize("name", SAME)
def test_loss_and_greedy_text(name, tmp_path):
    """Their loss shifts the labels itself and is a mean over the predicted tokens. 60 tokens after
    prompts of several lengths, read together by us and one by one by them."""
    c = standins.with_context(SAME[name], 128) | NO_IDS
    # Around ones for norms and zeros for the rest: other models repeat themselves.
    rng = np.random.default_rng(0)
    scale = 0.08 if name == "gpt2's width" else 0.3
    weights = {
        tensor: (tensor.endswith("weight") and len(shape) == 1)
        + rng.normal(0, scale, shape).astype(np.float32)
        for tensor, shape in standins.shapes(c).items()
    }
    standins.write(tmp_path, c, weights)
    model = load(tmp_path, dtype=torch.float32)
    config, params = read(tmp_path)
    ids = token_ids(config, 3, 65)
    with torch.no_grad():
        expected = model(torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    objective = jax.jit(step_functions.objective, static_argnums=0)
    _, loss = objective(TrainConfig(model=config), params, ids)
    assert expected > 1 and float(loss) == pytest.approx(expected, rel=1e-5)

    prompts = [token_ids(config, 1, length, seed=length)[0].tolist() for length in (1, 33, 60)]
    lm = LanguageModel(config, transformer.unstack(params), IdTokenizer(config.vocab_size), step=0)
    done = generate.complete(lm, prompts, Settings(max_new_tokens=60, temperature=0))
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == greedy(model, prompt, 60)
    assert len({token for one in done for token in one.token_ids}) > 8


OURS = {
    "gpt2 without biases": "--model.no-bias --model.mlp relu2 --model.no-tied",
    "modern": "--model.positions rope --model.norm rms --model.mlp swiglu --model.qk-norm "
    "--model.no-bias --model.n-kv-heads 1",
    "llama": "--model.positions rope --model.norm rms --model.mlp swiglu --model.no-bias "
    "--model.no-tied --model.d-head 24 --model.rope-factor 2 --model.rope-context 8",
}


@pytest.mark.parametrize("flags", OURS.values(), ids=OURS)
def test_what_we_trained_runs_there(flags, text, tmp_path):
    """Trained here, exported, and the same logits and the same text by transformers."""
    shape = "shakespeare-char --seq-len 64 --batch-size 4 --steps 30 --warmup-steps 2"
    shape += " --model.n-layers 2 --model.d-model 32 --model.n-heads 2"
    argv = [*shape.split(), *flags.split(), "--data", text, "--out", tmp_path / "run"]
    succeed("train", *argv, "--learning-rate", "1e-2")
    convert("export", tmp_path / "run", tmp_path / "out")
    lm = gpt.load(tmp_path / "run")
    model = load(tmp_path / "out")
    letters = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = token_ids(lm.config, 2, 64)
    ours = np.asarray(forward(lm.config, lm.params, ids))
    assert np.abs(ours - logits_of(model, ids)).max() < 1e-5 * np.abs(ours).max()
    prompt = "the cat sat"
    assert letters(prompt)["input_ids"] == lm.tokenizer.encode_ordinary(prompt)
    said = lm.generate(prompt, max_new_tokens=40, temperature=0)
    there = greedy(model, lm.tokenizer.encode_ordinary(prompt), 40)
    assert there[: len(said.token_ids)] == said.token_ids
    assert letters.decode(said.token_ids) == said.text
    about = json.loads((tmp_path / "out/config.json").read_text())
    assert about["eos_token_id"] == lm.tokenizer.eot_token == letters.eos_token_id


def python_of_the_document():
    text = (programs.ROOT / "docs/weights.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_what_the_document_does_with_an_export(tmp_path, monkeypatch, capsys):
    c = standins.GPT2 | {"vocab_size": 257, "eos_token_id": 256}
    folder = standins.write(tmp_path / "gpt2", c)
    standin_tokenizers.write_bytes(folder)
    monkeypatch.chdir(tmp_path)
    convert("import", "gpt2", "run")
    convert("export", "run", "mine")
    exec(python_of_the_document()[0], {})
    printed = capsys.readouterr().out
    assert printed.startswith("The house stood")
    ours = gpt.load("run").generate("The house stood", max_new_tokens=20, temperature=0)
    assert printed.rstrip("\n") == str(ours).rstrip("\n")


@pytest.mark.parametrize("has_biases", [True, False])
def test_what_the_document_does_with_nanogpts_checkpoint(has_biases, tmp_path, monkeypatch):
    """nanoGPT's names and axes, which are those of its own code, from a model of transformers."""
    c = standins.GPT2 | {"activation_function": "gelu"}
    model = load(standins.write(tmp_path / "gpt2", c))
    if not has_biases:
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(weight)
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    saved = {
        "_orig_mod." + name: tensor.T.contiguous() if name.endswith(turned) else tensor
        for name, tensor in model.state_dict().items()
        if has_biases or not name.endswith("bias")
    }
    sizes = {name: c[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    about = {"block_size": c["n_positions"], "bias": has_biases, "dropout": 0.0}
    torch.save({"model": saved, "model_args": sizes | about, "iter_num": 5}, tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    exec(python_of_the_document()[1], {})
    config, params = read(tmp_path / "nanogpt")
    ids = token_ids(config, 2, 64)
    agree(forward(config, params, ids), logits_of(model, ids))


# Tokenizers.

PIECES = ["the", "'LL", " 1234", "今天", "🙂", "\u200d", "é", "\n\n", "   ", "\t", "\r", "<|", "▁"]
WILD = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs", "Cn"])))
).map("".join)


def write(files, folder):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("form", ["GPT-2", "Llama 3", "Qwen", "TinyLlama"])
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
