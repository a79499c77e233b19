"""Models in the Hugging Face form: config.json of the hub's, and folders with random weights.

hub_configs.json holds what the models' own files say, field for field. The folders are written with
NumPy and the safetensors library. The logits that they should give are computed from the papers of
GPT-2 and Llama, by the names that the files have, in float64: independent of the converter.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy_transformer import ACTIVATIONS, sigmoid, softmax, turn
from safetensors.numpy import save_file

from gpt.config import ModelConfig

HUB = json.loads(Path(__file__).with_name("hub_configs.json").read_text())


def saved_again(c):
    """A config as transformers 5 writes it: `dtype`, and RoPE's fields in one object."""
    old = ("torch_dtype", "rope_theta", "rope_scaling")
    rope = {"rope_type": "default", "rope_theta": c["rope_theta"]} | (c.get("rope_scaling") or {})
    fields = {"dtype": c["torch_dtype"], "pad_token_id": None, "rope_parameters": rope}
    if c["model_type"].startswith("qwen"):
        fields |= {"layer_types": ["full_attention"] * c["num_hidden_layers"]}
        fields |= {"sliding_window": None}
    kept = {name: value for name, value in c.items() if name not in old}
    return kept | fields | {"transformers_version": "5.23.0"}


HUB |= {f"{name}, saved again": saved_again(HUB[name]) for name in ("Llama-3.2-1B", "Qwen3-0.6B")}


def small(c):
    """`c` with all its fields and heads, but few layers, narrow ones, and few tokens."""
    if c["model_type"] == "gpt2":
        narrow = {"n_embd": 4 * c["n_head"], "n_layer": 2, "n_positions": 64, "n_ctx": 64}
        return c | narrow | {"vocab_size": 300}
    heads = c["num_attention_heads"]
    sizes = {"hidden_size": 4 * heads, "num_hidden_layers": 2, "intermediate_size": 40}
    sizes |= {"max_position_embeddings": 64, "vocab_size": 300}
    if "head_dim" in c:  # as wide, against the others, as it was
        sizes["head_dim"] = 4 * heads * c["head_dim"] // c["hidden_size"]
    if c.get("sliding_window"):
        sizes["sliding_window"] = 64
    if "layer_types" in c:
        sizes["layer_types"] = c["layer_types"][:2]
    for name in ("rope_scaling", "rope_parameters"):
        if "original_max_position_embeddings" in (c.get(name) or {}):
            sizes[name] = c[name] | {"original_max_position_embeddings": 32}
    return c | sizes


SMALL = ModelConfig(257, context_length=64, n_layers=2, n_heads=2, d_model=16, d_ff=20)
MODERN = replace(SMALL, positions="rope", norm="rms", mlp="swiglu", bias=False)
GPT2 = small(HUB["gpt2"]) | {"n_embd": 24, "n_head": 3, "bos_token_id": 299, "eos_token_id": 299}
LLAMA = small(HUB["TinyLlama-1.1B"]) | {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "eos_token_id": 299,
}
del LLAMA["bos_token_id"]
STRETCHED = small(HUB["Llama-3.2-1B"])["rope_scaling"] | {"factor": 8.0}
KINDS = {
    "gpt2": GPT2,
    "gpt2, untied, exact gelu, narrow mlp": GPT2
    | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40},
    "gpt2, relu": GPT2 | {"activation_function": "relu", "layer_norm_epsilon": 1e-2},
    "llama": LLAMA | {"rms_norm_eps": 1e-2},
    "llama 3": LLAMA
    | {"rope_scaling": STRETCHED, "rope_theta": 500.0, "tie_word_embeddings": True},
    "llama, biases": LLAMA
    | {"attention_bias": True, "mlp_bias": True, "head_dim": 8, "num_key_value_heads": 4},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
    "qwen2": LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
}


def with_context(c, T):
    """The config of a folder for texts of up to `T` tokens."""
    fields = ("n_positions", "n_ctx") if c["model_type"] == "gpt2" else ("max_position_embeddings",)
    return c | dict.fromkeys(fields, T)


def shapes(c):
    """Names and shapes of a model's tensors, as transformers saves them."""
    return gpt2_shapes(c) if c["model_type"] == "gpt2" else llama_shapes(c)


def gpt2_shapes(c):
    D, V = c["n_embd"], c["vocab_size"]
    F = c.get("n_inner") or 4 * D
    linear = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D)}
    linear |= {"mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
    found = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (c["n_positions"], D)}
    for i in range(c["n_layer"]):
        h = f"transformer.h.{i}"
        for name in ("ln_1", "ln_2"):
            found |= {f"{h}.{name}.weight": (D,), f"{h}.{name}.bias": (D,)}
        for name, shape in linear.items():
            found |= {f"{h}.{name}.weight": shape, f"{h}.{name}.bias": shape[1:]}
    found |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    return found | ({} if c.get("tie_word_embeddings", True) else {"lm_head.weight": (V, D)})


def llama_shapes(c):
    D, V, F = c["hidden_size"], c["vocab_size"], c["intermediate_size"]
    N, K = c["num_attention_heads"], c["num_key_value_heads"]
    H, kind = c.get("head_dim") or D // N, c["model_type"]
    linear = {"self_attn.q": (N * H, D), "self_attn.k": (K * H, D), "self_attn.v": (K * H, D)}
    linear |= {"self_attn.o": (D, N * H), "mlp.gate": (F, D), "mlp.up": (F, D), "mlp.down": (D, F)}
    biased = {n: c.get("attention_bias") or (kind == "qwen2" and n[-1] != "o") for n in linear}
    biased |= {n: c.get("mlp_bias") for n in linear if n.startswith("mlp")}
    found = {"model.embed_tokens.weight": (V, D)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (D,)
        if kind == "qwen3":
            found |= {f"{layer}.self_attn.{n}_norm.weight": (H,) for n in "qk"}
        for name, shape in linear.items():
            found[f"{layer}.{name}_proj.weight"] = shape
            if biased[name]:
                found[f"{layer}.{name}_proj.bias"] = shape[:1]
    found["model.norm.weight"] = (D,)
    return found | ({} if c["tie_word_embeddings"] else {"lm_head.weight": (V, D)})


def tensors(c, seed=0, dtype=np.float32):
    """Random tensors, no scale near one and no bias near zero."""
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0.1, 0.3, s).astype(dtype) for n, s in shapes(c).items()}


def write(folder, c, weights=None, parts=1):
    """A model's folder: config.json and one safetensors file, or several with an index."""
    weights = tensors(c) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    if parts == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = dict(list(weights.items())[part::parts])
        save_file(chosen, folder / file, {"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    about = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    return folder


def logits(c, weights, ids):
    """[T, V] of one sequence of token ids, in float64."""
    weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    return (gpt2_logits if c["model_type"] == "gpt2" else llama_logits)(c, weights, ids)


def attend(q, k, v):
    scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / math.sqrt(q.shape[1]), -np.inf)
    return softmax(scores) @ v


def gpt2_logits(c, w, ids):
    D, N, act = c["n_embd"], c["n_head"], {"gelu_new": "gelu_tanh"}
    act = ACTIVATIONS[act.get(c["activation_function"], c["activation_function"])]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c["layer_norm_epsilon"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    for i in range(c["n_layer"]):
        h = f"transformer.h.{i}"
        qkv = conv(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
        heads = [np.split(part, N, axis=1) for part in np.split(qkv, 3, axis=1)]
        x = x + conv(np.concatenate(list(map(attend, *heads)), 1), f"{h}.attn.c_proj")
        x = x + conv(act(conv(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    assert x.shape == (len(ids), D)
    return norm(x, "transformer.ln_f") @ w.get("lm_head.weight", w["transformer.wte.weight"]).T


def llama_logits(c, w, ids):
    N, K = c["num_attention_heads"], c["num_key_value_heads"]
    scaling = c.get("rope_scaling") or {}
    rope = SimpleNamespace(
        rope_theta=c["rope_theta"],
        rope_factor=scaling.get("factor", 1),
        rope_low=scaling.get("low_freq_factor", 1),
        rope_high=scaling.get("high_freq_factor", 4),
        rope_context=scaling.get("original_max_position_embeddings", 32),
    )

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"]) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def heads(x, name, n, turned):
        found = np.split(linear(x, f"{name}_proj"), n, axis=1)
        if turned and f"{name}_norm.weight" in w:
            found = [norm(head, f"{name}_norm") for head in found]
        return [turn(head, rope) for head in found] if turned else found

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer, y = f"model.layers.{i}", None
        y = norm(x, f"{layer}.input_layernorm")
        q = heads(y, f"{layer}.self_attn.q", N, True)
        k, v = (heads(y, f"{layer}.self_attn.{n}", K, n == "k") for n in "kv")
        mixed = [attend(q[n], k[n * K // N], v[n * K // N]) for n in range(N)]
        x = x + linear(np.concatenate(mixed, 1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(y, f"{layer}.mlp.gate_proj")
        inner = gate * sigmoid(gate) * linear(y, f"{layer}.mlp.up_proj")
        x = x + linear(inner, f"{layer}.mlp.down_proj")
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
