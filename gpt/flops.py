"""Parameters, FLOPs and bytes of a model: arithmetic on its config, without any arrays.

A product of matrices [m, k] and [k, n] counts as 2 m k n FLOPs. Norms, softmax and activation
functions are not counted, as is customary (Chowdhery et al. 2022, PaLM, appendix B).
Shape letters: see gpt/model/transformer.py.
"""

import inspect

from gpt.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def block_matrices(c: ModelConfig) -> int:
    """Entries of the weight matrices of one block."""
    attention = 2 * c.d_model * c.head_width * (c.n_heads + c.kv_heads)
    n_mlp_matrices = 3 if c.gated_mlp else 2
    return attention + n_mlp_matrices * c.d_model * c.ff_width


def mlp_inputs_width(c: ModelConfig) -> int:
    """Outputs of the first layer of the MLP: a gated one has the gate beside the values."""
    return 2 * c.ff_width if c.gated_mlp else c.ff_width


def qkv_width(c: ModelConfig) -> int:
    """Outputs of the projections to queries, keys and values."""
    return c.head_width * (c.n_heads + 2 * c.kv_heads)


def norm_vectors(c: ModelConfig, width: int) -> int:
    """Entries of the scale, and of the bias if there is one, of a norm over `width`."""
    return 2 * width if c.biased("norm") else width


def block_vectors(c: ModelConfig) -> int:
    """Entries of the norms and biases of one block."""
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
    """FLOPs of reading `n_tokens` tokens of one row that follow `n_before` earlier ones.

    Attention counts only the keys that the mask leaves visible. `n_logit_positions`: positions
    whose next-token distribution is computed (training: all; prefill and decode: one per row).
    """
    matrices = 2 * c.n_layers * block_matrices(c) * n_tokens
    visible_keys = n_tokens * n_before + n_tokens * (n_tokens + 1) // 2
    attention = 4 * c.n_layers * c.n_heads * c.head_width * visible_keys
    logits = 2 * c.d_model * c.vocab_size * n_logit_positions
    return matrices + attention + logits


def train_flops_per_token(c: ModelConfig) -> float:
    """FLOPs per token of a training step: forward once, backward twice that. Recomputation is not
    counted."""
    T = c.context_length
    return 3 * forward_flops(c, T, n_logit_positions=T) / T


def palm_factor(c: ModelConfig) -> float:
    """What the MFU of training is to be multiplied by for a comparison with PaLM's and nanoGPT's:
    these count attention to all T positions, 12 L N H T FLOPs per token, and train_flops_per_token
    the half of them that the causal mask leaves visible."""
    masked_keys = (c.context_length - 1) / 2  # of a token, on average
    masked = 12 * c.n_layers * c.n_heads * c.head_width * masked_keys
    return 1 + masked / train_flops_per_token(c)


def weight_bytes(c: ModelConfig, dtype: str | None = None, int8: bool = False) -> int:
    """Bytes of all weights as stored, vocabulary padding included.

    `int8`: matrices and vocabulary tables take one byte per entry, and four for the scale of each
    output.
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
    """Bytes of the keys and values of `slots` positions in `batch` rows."""
    item = ITEM_BYTES[c.cache_dtype or "float32"]
    return 2 * c.n_layers * batch * c.kv_heads * slots * c.head_width * item


def unread_bytes(c: ModelConfig, n_positions: int, n_tokens: int, int8: bool) -> int:
    """Bytes of table rows that stay unread when `n_tokens` tokens at `n_positions` positions are
    looked up. The table of a tied head is read whole."""
    item = ITEM_BYTES[c.param_dtype]
    unread = 0
    if not c.tied:
        row_bytes = c.d_model + 4 if int8 else c.d_model * item
        unread += (c.padded_vocab - min(n_tokens, c.padded_vocab)) * row_bytes
    if c.positions == "learned":
        unread += (c.context_length - min(n_positions, c.context_length)) * c.d_model * item
    return unread


def decode_bytes(c: ModelConfig, batch: int, slots: int, int8: bool = False) -> int:
    """Bytes that one decode step must move: every weight and the cache of `slots` positions are
    read once, one new position is written. Of tables used only for lookup, `batch` rows are read.
    """
    weights = weight_bytes(c, int8=int8) - unread_bytes(c, batch, batch, int8)
    return weights + cache_bytes(c, batch, slots) + cache_bytes(c, batch, 1)


def prefill_bytes(c: ModelConfig, batch: int, n_tokens: int, int8: bool = False) -> int:
    """Bytes that reading prompts must move: every weight is read once, keys and values are
    written. Of tables used only for lookup, the rows of the tokens are read. Activations are not
    counted, since they may stay in the processor's caches."""
    weights = weight_bytes(c, int8=int8) - unread_bytes(c, n_tokens, batch * n_tokens, int8)
    return weights + cache_bytes(c, batch, n_tokens)


def describe() -> str:
    """The formulas of this file in words: the docstrings of its functions."""
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
