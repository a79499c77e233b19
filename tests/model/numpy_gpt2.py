"""GPT-2's forward pass in plain NumPy, float64, written apart from the product as an oracle.

One sequence at a time, one head at a time, no batching, no cache: slow and hard to get wrong.
"""

import math

import numpy as np


def norm(x, weights):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * weights["scale"] + weights.get("bias", 0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(x, w):
    T, (_, n_heads, width) = len(x), w["q"].shape
    group = n_heads // w["k"].shape[1]
    out = np.zeros_like(x)
    for head in range(n_heads):
        q = x @ w["q"][:, head] + w.get("q_bias", np.zeros((n_heads, 1)))[head]
        k = x @ w["k"][:, head // group] + w.get("k_bias", np.zeros((n_heads, 1)))[head // group]
        v = x @ w["v"][:, head // group] + w.get("v_bias", np.zeros((n_heads, 1)))[head // group]
        scores = np.where(np.tri(T, dtype=bool), q @ k.T / math.sqrt(width), -np.inf)
        out += softmax(scores) @ v @ w["o"][head]
    return out + w.get("o_bias", 0)


def forward(params, tokens, vocab_size):
    """Logits [T, V] of one sequence of token ids; `params` is the stacked dict as float64."""
    x = params["tokens"][tokens] + params["positions"][: len(tokens)]
    for i in range(len(params["blocks"]["mlp"]["up"])):
        block = {name: {k: v[i] for k, v in w.items()} for name, w in params["blocks"].items()}
        x = x + attention(norm(x, block["attention_norm"]), block["attention"])
        mlp = block["mlp"]
        h = gelu(norm(x, block["mlp_norm"]) @ mlp["up"] + mlp.get("up_bias", 0))
        x = x + h @ mlp["down"].T + mlp.get("down_bias", 0)
    return norm(x, params["final_norm"]) @ params["tokens"][:vocab_size].T
