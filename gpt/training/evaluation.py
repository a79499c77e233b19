"""The loss on held-out text, over the same windows each time."""

import math
from collections.abc import Callable

import jax

from gpt.config import TrainConfig
from gpt.data import batches
from gpt.data.token_files import Tokens


def evaluate(
    config: TrainConfig, params: dict, eval_step: Callable, val: Tokens
) -> tuple[float, float]:
    """The loss on held-out text in nats per token, and in bits per byte.

    `eval_step`: compiled by step_functions.compile_steps. Reads at most `config.eval_tokens`
    tokens (0: all). Bits per byte use the bytes per token of the whole held-out text, so they are
    an estimate if only part of it is read.
    """
    rows = config.batch_size // config.grad_accum
    total_loss = total_weight = 0.0
    for tokens, weights in batches.evaluation_windows(
        val, config.sequence_length, config.eval_tokens, rows
    ):
        # Wait for each step: on a CPU, steps with collectives must not pile up.
        loss, weight = jax.device_get(eval_step(params, tokens, weights))
        total_loss += loss
        total_weight += weight
    nats_per_token = float(total_loss / total_weight)
    bits_per_byte = nats_per_token / math.log(2) * len(val) / val.n_bytes
    return nats_per_token, bits_per_byte
