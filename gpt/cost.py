"""Parameters, FLOPs and bytes of a model: pure arithmetic on its config, no arrays.

A product of [m, k] and [k, n] counts 2 m k n FLOPs. Norms, softmax and activation functions are
left out, as is customary (Chowdhery et al. 2022, PaLM, appendix B).
Shape letters: see model/transformer.py.
"""

from gpt.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def block_matrices(c: ModelConfig) -> int:
    """Entries of one block's weight matrices."""
    attention = 2 * c.d_model * c.head_width * (c.n_heads + c.kv_heads)
    return attention + 2 * c.d_model * c.ff_width


def block_vectors(c: ModelConfig) -> int:
    """Entries of one block's norms and biases."""
    norms = 2 * c.d_model
    if not c.bias:
        return norms
    heads = c.head_width * (c.n_heads + 2 * c.kv_heads) + c.d_model
    return norms + 2 * c.d_model + heads + c.ff_width + c.d_model


def parameters(c: ModelConfig) -> int:
    """Weights of the model, vocabulary padding left out, the tied head counted once."""
    tables = (c.vocab_size + c.context_length) * c.d_model
    final_norm = c.d_model * (2 if c.bias else 1)
    return tables + c.n_layers * (block_matrices(c) + block_vectors(c)) + final_norm


def forward_flops(c: ModelConfig, n_tokens: int, n_before: int = 0, n_heads_out: int = 0) -> int:
    """FLOPs of reading `n_tokens` of one row that stand after `n_before` others.

    Attention counts the keys that the mask leaves visible. `n_heads_out`: positions whose
    next-token distribution is computed (training: all; prefill and decode: one a row).
    """
    products = 2 * c.n_layers * block_matrices(c) * n_tokens
    keys = n_tokens * n_before + n_tokens * (n_tokens + 1) // 2
    attention = 4 * c.n_layers * c.n_heads * c.head_width * keys
    return products + attention + 2 * c.d_model * c.vocab_size * n_heads_out


def train_flops_per_token(c: ModelConfig) -> float:
    """FLOPs a token of a training step: forward once, backward twice; recomputation not counted."""
    T = c.context_length
    return 3 * forward_flops(c, T, n_heads_out=T) / T


def weight_bytes(c: ModelConfig, dtype: str | None = None) -> int:
    """Bytes of all weights as stored, vocabulary padding included."""
    padding = (c.padded_vocab - c.vocab_size) * c.d_model
    return (parameters(c) + padding) * ITEM_BYTES[dtype or c.param_dtype]


def cache_bytes(c: ModelConfig, batch: int, slots: int) -> int:
    """Bytes of the keys and values of `slots` positions in `batch` rows."""
    item = ITEM_BYTES[c.cache_dtype or "float32"]
    return 2 * c.n_layers * batch * c.kv_heads * slots * c.head_width * item


def decode_bytes(c: ModelConfig, batch: int, slots: int) -> int:
    """Bytes one decode step must move: every weight once, the cache of `slots` positions once, one
    new position written. Of the position table only `batch` rows are read."""
    tables = (c.context_length - min(batch, c.context_length)) * c.d_model
    weights = weight_bytes(c) - tables * ITEM_BYTES[c.param_dtype]
    return weights + cache_bytes(c, batch, slots) + cache_bytes(c, batch, 1)
