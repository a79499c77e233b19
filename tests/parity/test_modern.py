"""Our rope, RMSNorm, SwiGLU, grouped queries, QK-norm and biases against transformers' Llama,
Qwen2 and Qwen3 on torch, with the same random weights."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt.config import ModelConfig
from gpt.model import transformer
from gpt.sampling import generate
from gpt.sampling.settings import Settings
from gpt.training import loss

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA = ModelConfig(
    300,
    context_length=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_model=64,
    d_ff=96,
    positions="rope",
    norm="rms",
    mlp="swiglu",
    tied=False,
    bias=False,
)
QWEN2 = replace(LLAMA, qkv_bias=True, norm_epsilon=1e-6, tied=True)
QWEN3 = replace(LLAMA, qk_norm=True, d_head=24, norm_epsilon=1e-6, rope_theta=1e6, tied=True)
BIASED = {"qkv_bias": True, "out_bias": True}
SHAPES = {
    "llama": ("Llama", LLAMA),
    "llama, far wavelengths": ("Llama", replace(LLAMA, rope_theta=500_000.0)),
    "llama, one kv head": ("Llama", replace(LLAMA, n_kv_heads=1)),
    "llama, every kv head": ("Llama", replace(LLAMA, n_kv_heads=None)),
    "llama, tied": ("Llama", replace(LLAMA, tied=True)),
    "llama, large epsilon": ("Llama", replace(LLAMA, norm_epsilon=1e-2)),
    "llama, attention biases": ("Llama", replace(LLAMA, **BIASED)),
    "llama, mlp biases": ("Llama", replace(LLAMA, mlp_bias=True)),
    "llama, wide heads": ("Llama", replace(LLAMA, d_head=32)),
    "qwen2": ("Qwen2", QWEN2),
    "qwen3": ("Qwen3", QWEN3),
    "qwen3, large epsilon": ("Qwen3", replace(QWEN3, norm_epsilon=1e-2, tied=False)),
    "qwen3, one kv head, biases": ("Qwen3", replace(QWEN3, n_kv_heads=1, **BIASED)),
}
WHOLE = ("llama", "qwen2", "qwen3")  # also trained and decoded


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """torch's threads wait for each other longer than such small products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def theirs(family, config, seed=0):
    """transformers' model, no weight at its initial value: a scale of one would hide a bug."""
    torch.manual_seed(seed)
    own = {
        "Llama": {"attention_bias": config.biased("qkv"), "mlp_bias": config.biased("mlp")},
        "Qwen2": {},  # queries, keys and values alone are biased
        "Qwen3": {"attention_bias": config.biased("qkv")},
    }[family]
    width = {} if family == "Qwen2" else {"head_dim": config.head_width}
    shape = getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        hidden_size=config.d_model,
        intermediate_size=config.ff_width,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
        **own,
        **width,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(shape).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def read_attention(config, layers):
    """Their [out, in] matrices as our [D, heads, H]; scales and biases where there are any."""
    D, H = config.d_model, config.head_width
    parts = {
        "o": layers("self_attn.o_proj.weight").swapaxes(1, 2).reshape(-1, config.n_heads, H, D)
    }
    for name in "qkv":
        matrix = layers(f"self_attn.{name}_proj.weight").swapaxes(1, 2)
        parts[name] = matrix.reshape(config.n_layers, D, -1, H)
        if config.biased("qkv"):
            bias = layers(f"self_attn.{name}_proj.bias")
            parts[f"{name}_bias"] = bias.reshape(config.n_layers, -1, H)
    if config.biased("out"):
        parts["o_bias"] = layers("self_attn.o_proj.bias")
    if config.qk_norm:
        parts["q_norm"] = {"scale": layers("self_attn.q_norm.weight")}
        parts["k_norm"] = {"scale": layers("self_attn.k_norm.weight")}
    return parts


def read_mlp(config, layers):
    """Their [out, in] matrices as ours: [D, F] all three, which is [out, in] for the last."""
    parts = {
        "up": layers("mlp.up_proj.weight").swapaxes(1, 2),
        "gate": layers("mlp.gate_proj.weight").swapaxes(1, 2),
        "down": layers("mlp.down_proj.weight"),
    }
    if config.biased("mlp"):
        parts |= {f"{name}_bias": layers(f"mlp.{name}_proj.bias") for name in tuple(parts)}
    return parts


def ours(config, model):
    """The same weights as our stacked params; every one of theirs is read."""
    weights = {name: w.detach().numpy() for name, w in model.state_dict().items()}
    unread = set(weights) - ({"lm_head.weight"} if config.tied else set())

    def read(name):
        unread.remove(name)
        return weights[name]

    def layers(name):
        return np.stack([read(f"model.layers.{i}.{name}") for i in range(config.n_layers)])

    padding = np.zeros((config.padded_vocab - config.vocab_size, config.d_model), np.float32)
    params = {
        "tokens": np.concatenate([read("model.embed_tokens.weight"), padding]),
        "blocks": {
            "attention_norm": {"scale": layers("input_layernorm.weight")},
            "attention": read_attention(config, layers),
            "mlp_norm": {"scale": layers("post_attention_layernorm.weight")},
            "mlp": read_mlp(config, layers),
        },
        "final_norm": {"scale": read("model.norm.weight")},
    }
    if not config.tied:
        params["head"] = np.concatenate([read("lm_head.weight"), padding])
    same = jax.tree.map(lambda a, b: a.shape == b.shape, params, transformer.abstract(config))
    assert all(jax.tree.leaves(same))
    assert not unread
    return jax.tree.map(jnp.asarray, params)


def make_pair(name):
    """A config, our weights, and their model that holds the same."""
    family, config = SHAPES[name]
    model = theirs(family, config)
    return config, ours(config, model), model


def token_ids(config, rows, length, seed=1):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length))


@pytest.mark.parametrize("name", SHAPES)
def test_logits(name):
    config, params, model = make_pair(name)
    assert all(weight.std() > 0.05 for weight in model.parameters()), "a weight left as it began"
    ids = token_ids(config, 2, 128)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    logits = jax.jit(transformer.forward, static_argnums=0)(config, params, ids)
    assert expected.std() > 0.3, "logits so flat that they would agree by themselves"
    assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", WHOLE)
def test_loss_of_labels(name):
    """Their loss shifts the labels itself and is a mean over the predicted tokens."""
    config, params, model = make_pair(name)
    ids = token_ids(config, 3, 65)
    with torch.no_grad():
        expected = model(torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    assert expected > 1
    losses, *_ = jax.jit(loss.sequence_losses, static_argnums=0)(config, params, ids)
    assert float(losses.mean()) == pytest.approx(expected, rel=1e-5)


class Numerals:
    """A tokenizer whose text is the token ids themselves, without an end-of-text."""

    eot_token = -1

    def encode_ordinary(self, text):
        return [int(word) for word in text.split()]

    def decode_bytes(self, tokens):
        return "".join(f" {token}" for token in tokens).encode()


@pytest.mark.parametrize("name", WHOLE)
def test_greedy_text(name):
    """60 tokens after prompts of several lengths, read together by us and one by one by them."""
    config, params, model = make_pair(name)
    prompts = [token_ids(config, 1, length, seed=length)[0].tolist() for length in (1, 33, 60)]
    lm = SimpleNamespace(config=config, params=transformer.unstack(params), mesh=None)
    lm.tokenizer = Numerals()
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    done = generate.complete(lm, texts, Settings(max_new_tokens=60, temperature=0))
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False
        )
        assert len(completion.token_ids) == 60
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
    seen = {token for completion in done for token in completion.token_ids}
    assert len(seen) > 8, "texts so dull that any model might agree"
