"""Our GPT-2 against transformers' on torch, with the same random weights: two readings of one
paper, by different people, in different frameworks."""

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

SHAPES = {
    "small": ModelConfig(300, context_length=160, n_layers=3, n_heads=4, d_model=64),
    "one head, one layer": ModelConfig(97, context_length=160, n_layers=1, n_heads=1, d_model=48),
    "other mlp": ModelConfig(512, context_length=160, n_layers=2, n_heads=2, d_model=64, d_ff=100),
    "deep": ModelConfig(1000, context_length=160, n_layers=8, n_heads=8, d_model=128),
    "gpt2's width": ModelConfig(50257, context_length=160, n_layers=2, n_heads=12, d_model=768),
}


def theirs(config, seed=0):
    """transformers' model, no weight at its initial value: a zero bias would hide a bug."""
    torch.manual_seed(seed)
    shape = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=config.ff_width,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.08)
    return model


def ours(config, model):
    """The same weights as our stacked params. Theirs are [in, out], q, k and v side by side."""
    weights = {name: w.detach().numpy() for name, w in model.transformer.state_dict().items()}
    N, H = config.n_heads, config.head_width

    def layers(name):
        return np.stack([weights[f"h.{i}.{name}"] for i in range(config.n_layers)])

    def norm(name, read=layers):
        return {"scale": read(f"{name}.weight"), "bias": read(f"{name}.bias")}

    q, k, v = np.split(layers("attn.c_attn.weight"), 3, axis=-1)
    q_bias, k_bias, v_bias = np.split(layers("attn.c_attn.bias"), 3, axis=-1)
    attention = {
        "q": q.reshape(-1, config.d_model, N, H),
        "k": k.reshape(-1, config.d_model, N, H),
        "v": v.reshape(-1, config.d_model, N, H),
        "q_bias": q_bias.reshape(-1, N, H),
        "k_bias": k_bias.reshape(-1, N, H),
        "v_bias": v_bias.reshape(-1, N, H),
        "o": layers("attn.c_proj.weight").reshape(-1, N, H, config.d_model),
        "o_bias": layers("attn.c_proj.bias"),
    }
    mlp = {
        "up": layers("mlp.c_fc.weight"),
        "up_bias": layers("mlp.c_fc.bias"),
        "down": layers("mlp.c_proj.weight").swapaxes(1, 2),  # ours is [out, in]
        "down_bias": layers("mlp.c_proj.bias"),
    }
    padding = np.zeros((config.padded_vocab - config.vocab_size, config.d_model), np.float32)
    params = {
        "tokens": np.concatenate([weights["wte.weight"], padding]),
        "positions": weights["wpe.weight"],
        "blocks": {
            "attention_norm": norm("ln_1"),
            "attention": attention,
            "mlp_norm": norm("ln_2"),
            "mlp": mlp,
        },
        "final_norm": norm("ln_f", weights.__getitem__),
    }
    same = jax.tree.map(lambda a, b: a.shape == b.shape, params, transformer.abstract(config))
    assert all(jax.tree.leaves(same))
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def pair(request):
    """A config, our weights, and their model that holds the same."""
    config, model = request.param, theirs(request.param)
    return config, ours(config, model), model


def token_ids(config, rows, length, seed=1):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length))


@pytest.mark.parametrize("length", [1, 37, 160])
def test_logits(pair, length):
    config, params, model = pair
    ids = token_ids(config, 2, length)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    logits = jax.jit(transformer.forward, static_argnums=0)(config, params, ids)
    assert expected.std() > 0.3, "logits so flat that they would agree by themselves"
    assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_loss_of_labels(pair):
    """Their loss shifts the labels itself and is a mean over the predicted tokens."""
    config, params, model = pair
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


def test_greedy_text(pair):
    """100 tokens after prompts of several lengths, read together by us and one by one by them."""
    config, params, model = pair
    prompts = [token_ids(config, 1, length, seed=length)[0].tolist() for length in (1, 33, 60)]
    lm = SimpleNamespace(config=config, params=transformer.unstack(params), mesh=None)
    lm.tokenizer = Numerals()
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    done = generate.complete(lm, texts, Settings(max_new_tokens=100, temperature=0))
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
    seen = {token for completion in done for token in completion.token_ids}
    assert len(seen) > 8, "texts so dull that any model might agree"
