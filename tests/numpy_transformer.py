"""The forward pass in plain NumPy, float64, written apart from the product as an oracle.

One sequence at a time, one head at a time, no batching, no cache: slow and hard to get wrong.
"""

import math

import numpy as np


def norm(x, weights, c):
    if c.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)
    return y * weights["scale"] + weights.get("bias", 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def speed(theta, c):
    """Radians a token of one pair, which Llama 3.1 slows where a turn takes many tokens."""
    turn, context = 2 * math.pi / theta, c.rope_context
    if turn < context / c.rope_high:
        return theta
    if turn > context / c.rope_low:
        return theta / c.rope_factor
    smooth = (context / turn - c.rope_low) / (c.rope_high - c.rope_low)
    return (1 - smooth) * theta / c.rope_factor + smooth * theta


def turn(x, c):
    """RoPE by complex numbers: pair (i, i + H/2) of position t times exp(i t theta^(-2i/H))."""
    half = x.shape[1] // 2
    speeds = [speed(c.rope_theta ** (-i / half), c) for i in range(half)]
    angle = np.outer(np.arange(len(x)), speeds)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def waves(length, width):
    out = np.zeros((length, width))
    for t in range(length):
        for i in range(0, width, 2):
            out[t, i] = math.sin(t / 10000 ** (i / width))
            out[t, i + 1] = math.cos(t / 10000 ** (i / width))
    return out


def attention(x, w, c):
    T, (_, n_heads, width) = len(x), w["q"]["kernel"].shape
    group = n_heads // w["k"]["kernel"].shape[1]
    out = np.zeros_like(x)

    def project(name, head):
        bias = w[name]["bias"][head] if "bias" in w[name] else 0
        return x @ w[name]["kernel"][:, head] + bias

    for head in range(n_heads):
        q, k = project("q", head), project("k", head // group)
        if c.qk_norm:
            q, k = norm(q, w["q_norm"], c), norm(k, w["k_norm"], c)
        if c.positions == "rope":
            q, k = turn(q, c), turn(k, c)
        scores = np.where(np.tri(T, dtype=bool), q @ k.T / math.sqrt(width), -np.inf)
        out += softmax(scores) @ project("v", head // group) @ w["o"]["kernel"][head]
    return out + w["o"].get("bias", 0)


def mlp(x, w, c):
    def linear(x, name):
        return x @ w[name]["kernel"] + w[name].get("bias", 0)

    h = linear(x, "up")
    if c.mlp == "swiglu":
        gate = linear(x, "gate")
        h = gate * sigmoid(gate) * h
    else:
        h = ACTIVATIONS[c.mlp](h)
    return linear(h, "down")


def forward(params, tokens, c):
    """Logits [T, V] of one sequence of token ids; `params` is the stacked dict as float64."""
    x = params["tokens"][tokens]
    if c.positions == "learned":
        x = x + params["positions"][: len(tokens)]
    if c.positions == "sinusoidal":
        x = x * math.sqrt(c.d_model) + waves(len(tokens), c.d_model)
    for i in range(c.n_layers):
        layer = pick(params["blocks"], i)
        for name, sublayer in (("attention", attention), ("mlp", mlp)):
            weights = layer[name], layer[f"{name}_norm"]
            if c.norm_place == "pre":
                x = x + sublayer(norm(x, weights[1], c), weights[0], c)
            else:
                x = norm(x + sublayer(x, weights[0], c), weights[1], c)
    x = norm(x, params["final_norm"], c) if c.norm_place == "pre" else x
    logits = x @ (params["tokens"] if c.tied else params["head"])[: c.vocab_size].T
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def pick(tree, i):
    return {k: pick(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
