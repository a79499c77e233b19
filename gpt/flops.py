"""Parameters, FLOPs and bytes of a model: arithmetic on its config, without any arrays.

A product of matrices [m, k] and [k, n] counts as 2 m k n FLOPs. Norms, softmax and activation
functions are not counted, as is customary (Chowdhery et al. 2022, PaLM, appendix B).
Shape letters are defined in gpt/model/transformer.py.
"""

import inspect

from gpt.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def block_matrices(c: ModelConfig) -> int:
    """Entries in one block's weight matrices."""
    attention = 2 * c.d_model * c.head_width * (c.n_heads + c.kv_heads)
    n_mlp_matrices = 3 if c.gated_mlp else 2
    return attention + n_mlp_matrices * c.d_model * c.ff_width


def mlp_inputs_width(c: ModelConfig) -> int:
    """Outputs of the MLP's first layer, including the gate if there is one."""
    return 2 * c.ff_width if c.gated_mlp else c.ff_width


def qkv_width(c: ModelConfig) -> int:
    """Outputs of the query, key and value projections."""
    return c.head_width * (c.n_heads + 2 * c.kv_heads)


def norm_vectors(c: ModelConfig, width: int) -> int:
    """Entries in the scale, and in the bias if there is one, of a norm over `width`."""
    return 2 * width if c.biased("norm") else width


def block_vectors(c: ModelConfig) -> int:
    """Entries in one block's norms and biases."""
    total = 2 * norm_vectors(c, c.d_model)
    if c.qk_norm:
        total += 2 * norm_vectors(c, c.head_width)
    if c.biased("qkv"):
        total += qkv_width(c)
    if c.biased("out"):
        total += c.d_model
    if c.biased("mlp"):
        total += mlp_inputs_width(c) + c.d_model
    return total


def parameters(c: ModelConfig) -> int:
    """Number of weights. Vocabulary padding is not counted, and a tied head counts once."""
    n_rows = c.vocab_size if c.tied else 2 * c.vocab_size  # of the embedding and an untied head
    if c.positions == "learned":
        n_rows += c.context_length
    blocks = c.n_layers * (block_matrices(c) + block_vectors(c))
    final_norm = norm_vectors(c, c.d_model) if c.norm_place == "pre" else 0
    return n_rows * c.d_model + blocks + final_norm


def forward_flops(
    c: ModelConfig, n_tokens: int, n_before: int = 0, n_logit_positions: int = 0
) -> int:
    """FLOPs to read `n_tokens` tokens of one row after `n_before` earlier ones.

    Attention counts only keys that the mask leaves visible. `n_logit_positions`: positions whose
    next-token distribution is computed (training: all; prefill and decode: one per row).
    """
    matrices = 2 * c.n_layers * block_matrices(c) * n_tokens
    visible_keys = n_tokens * n_before + n_tokens * (n_tokens + 1) // 2
    attention = 4 * c.n_layers * c.n_heads * c.head_width * visible_keys
    logits = 2 * c.d_model * c.vocab_size * n_logit_positions
    return matrices + attention + logits


def train_flops_per_token(c: ModelConfig) -> float:
    """Training FLOPs per token: a forward pass, and twice that for the backward pass. Recomputation
    is not counted."""
    T = c.context_length
    return 3 * forward_flops(c, T, n_logit_positions=T) / T


def palm_factor(c: ModelConfig) -> float:
    """Multiply training MFU by this to compare it with PaLM's and nanoGPT's: they count attention
    to all T positions, 12 L N H T FLOPs per token, while train_flops_per_token counts only the half
    that the causal mask leaves visible."""
    masked_keys = (c.context_length - 1) / 2  # per token, on average
    masked = 12 * c.n_layers * c.n_heads * c.head_width * masked_keys
    return 1 + masked / train_flops_per_token(c)


def weight_bytes(c: ModelConfig, dtype: str | None = None, int8: bool = False) -> int:
    """Bytes of all weights as stored, including vocabulary padding.

    `int8`: matrices and vocabulary tables take one byte per entry, and four per output for its
    scale.
    """
    item = ITEM_BYTES[dtype or c.param_dtype]
    n_tables = 1 if c.tied else 2
    padding = n_tables * (c.padded_vocab - c.vocab_size) * c.d_model
    total = (parameters(c) + padding) * item
    if int8:
        entries = c.n_layers * block_matrices(c) + n_tables * c.padded_vocab * c.d_model
        block_outputs = qkv_width(c) + mlp_inputs_width(c) + 2 * c.d_model
        scales = c.n_layers * block_outputs + n_tables * c.padded_vocab
        total -= entries * (item - 1) - 4 * scales
    return total


def cache_bytes(c: ModelConfig, batch: int, slots: int) -> int:
    """Bytes of keys and values for `slots` positions in `batch` rows."""
    item = ITEM_BYTES[c.cache_dtype or "float32"]
    return 2 * c.n_layers * batch * c.kv_heads * slots * c.head_width * item


def unread_bytes(c: ModelConfig, n_positions: int, n_tokens: int, int8: bool) -> int:
    """Bytes of table rows not read when looking up `n_tokens` tokens at `n_positions` positions. A
    tied head's table is read whole."""
    item = ITEM_BYTES[c.param_dtype]
    unread = 0
    if not c.tied:
        row_bytes = c.d_model + 4 if int8 else c.d_model * item
        unread += (c.padded_vocab - min(n_tokens, c.padded_vocab)) * row_bytes
    if c.positions == "learned":
        unread += (c.context_length - min(n_positions, c.context_length)) * c.d_model * item
    return unread


def decode_bytes(c: ModelConfig, batch: int, slots: int, int8: bool = False) -> int:
    """Bytes one decode step must move: it reads every weight and the cache of `slots` positions
    once, and writes one new position. From tables used only for lookup it reads `batch` rows.
    """
    weights = weight_bytes(c, int8=int8) - unread_bytes(c, batch, batch, int8)
    return weights + cache_bytes(c, batch, slots) + cache_bytes(c, batch, 1)


def prefill_bytes(c: ModelConfig, batch: int, n_tokens: int, int8: bool = False) -> int:
    """Bytes that prefill must move: it reads every weight once, and writes keys and values. From
    tables used only for lookup it reads the tokens' rows. Activations are not counted, since they
    may stay in the processor's caches."""
    weights = weight_bytes(c, int8=int8) - unread_bytes(c, n_tokens, batch * n_tokens, int8)
    return weights + cache_bytes(c, batch, n_tokens)


def describe() -> str:
    """This file's formulas in words: the docstrings of its functions."""
    functions = [
        parameters,
        forward_flops,
        train_flops_per_token,
        weight_bytes,
        cache_bytes,
        prefill_bytes,
        decode_bytes,
    ]
    paragraphs = [inspect.cleandoc(__doc__ or "")]
    for function in functions:
        paragraphs.append(f"{function.__name__}: {inspect.cleandoc(function.__doc__ or '')}")
    return "\n\n".join(paragraphs)
