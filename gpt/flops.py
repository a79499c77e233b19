"""Parameters, FLOPs and bytes of a model: pure arithmetic on its config, no arrays.

A product of [m, k] and [k, n] counts 2 m k n FLOPs. Norms, softmax and activation functions are
left out, as is customary (Chowdhery et al. 2022, PaLM, appendix B).
Shape letters: see model/transformer.py.
"""

import inspect

from gpt.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def block_matrices(c: ModelConfig) -> int:
    """Entries of one block's weight matrices."""
    attention = 2 * c.d_model * c.head_width * (c.n_heads + c.kv_heads)
    return attention + (3 if c.mlp == "swiglu" else 2) * c.d_model * c.ff_width


def block_outputs(c: ModelConfig) -> int:
    """Outputs of one block's weight matrices."""
    inner = (2 if c.mlp == "swiglu" else 1) * c.ff_width
    return c.head_width * (c.n_heads + 2 * c.kv_heads) + inner + 2 * c.d_model


def norm_vectors(c: ModelConfig, width: int) -> int:
    """Entries of one norm over `width`."""
    return width * (2 if c.biased("norm") else 1)


def block_vectors(c: ModelConfig) -> int:
    """Entries of one block's norms and biases."""
    norms = 2 * norm_vectors(c, c.d_model)
    norms += 2 * norm_vectors(c, c.head_width) if c.qk_norm else 0
    qkv = c.head_width * (c.n_heads + 2 * c.kv_heads) if c.biased("qkv") else 0
    inner = (2 if c.mlp == "swiglu" else 1) * c.ff_width
    mlp = inner + c.d_model if c.biased("mlp") else 0
    return norms + qkv + mlp + (c.d_model if c.biased("out") else 0)


def table_rows(c: ModelConfig) -> int:
    """Rows of width d_model in the tables: embedding, an untied head, learned positions."""
    positions = c.context_length if c.positions == "learned" else 0
    return c.vocab_size * (1 if c.tied else 2) + positions


def parameters(c: ModelConfig) -> int:
    """Weights of the model, vocabulary padding left out, a tied head counted once."""
    final_norm = norm_vectors(c, c.d_model) if c.norm_place == "pre" else 0
    blocks = c.n_layers * (block_matrices(c) + block_vectors(c))
    return table_rows(c) * c.d_model + blocks + final_norm


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


def weight_bytes(c: ModelConfig, dtype: str | None = None, int8: bool = False) -> int:
    """Bytes of all weights as stored, vocabulary padding included; `int8`: matrices and vocabulary
    tables in one byte an entry and four for the scale of each output."""
    item, tables = ITEM_BYTES[dtype or c.param_dtype], 1 if c.tied else 2
    padding = (c.padded_vocab - c.vocab_size) * c.d_model * tables
    saved = 0
    if int8:
        entries = c.n_layers * block_matrices(c) + tables * c.padded_vocab * c.d_model
        outputs = c.n_layers * block_outputs(c) + tables * c.padded_vocab
        saved = entries * (item - 1) - 4 * outputs
    return (parameters(c) + padding) * item - saved


def cache_bytes(c: ModelConfig, batch: int, slots: int) -> int:
    """Bytes of the keys and values of `slots` positions in `batch` rows."""
    item = ITEM_BYTES[c.cache_dtype or "float32"]
    return 2 * c.n_layers * batch * c.kv_heads * slots * c.head_width * item


def unread_bytes(c: ModelConfig, n_places: int, n_tokens: int, int8: bool) -> int:
    """Bytes of the rows of tables that are only looked up in, and not for these many."""
    item = ITEM_BYTES[c.param_dtype]
    row = c.d_model + 4 if int8 else c.d_model * item
    words = 0 if c.tied else (c.padded_vocab - min(n_tokens, c.padded_vocab)) * row
    places = c.context_length - min(n_places, c.context_length)
    return words + (places * c.d_model * item if c.positions == "learned" else 0)


def decode_bytes(c: ModelConfig, batch: int, slots: int, int8: bool = False) -> int:
    """Bytes one decode step must move: every weight once, the cache of `slots` positions once, one
    new position written. Of tables that are only looked up in, `batch` rows are read."""
    weights = weight_bytes(c, int8=int8) - unread_bytes(c, batch, batch, int8)
    return weights + cache_bytes(c, batch, slots) + cache_bytes(c, batch, 1)


def prefill_bytes(c: ModelConfig, batch: int, n_tokens: int, int8: bool = False) -> int:
    """Bytes that reading prompts must move: weights once, of tables that are looked up in the rows
    of the tokens, and the keys and values written. Activations may stay in caches: left out."""
    weights = weight_bytes(c, int8=int8) - unread_bytes(c, n_tokens, batch * n_tokens, int8)
    return weights + cache_bytes(c, batch, n_tokens)


def describe() -> str:
    """The formulas of this file: its docstrings, as they stand."""
    functions = (parameters, forward_flops, train_flops_per_token, weight_bytes, cache_bytes)
    functions += (prefill_bytes, decode_bytes)
    told = [f"{f.__name__}: {inspect.cleandoc(f.__doc__ or '')}" for f in functions]
    return "\n\n".join([inspect.cleandoc(__doc__ or ""), *told])
