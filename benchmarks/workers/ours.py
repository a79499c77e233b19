"""This project, as its users run it. Started by benchmarks/peers.py; it works once for each line of
standard input.

    python benchmarks/workers/ours.py train NAME BATCH
    python benchmarks/workers/ours.py prefill NAME BATCH PROMPT
    python benchmarks/workers/ours.py decode NAME BATCH PROMPT NEW [int8]

NAME is a preset, or llama. PROMPT and NEW are tokens per row.
"""

import dataclasses
import sys
import types

from turns import decode_step, serve, timed

from gpt import cli

cli.prepare_jax(cache=False)

import jax  # noqa: E402
import models  # noqa: E402
import numpy as np  # noqa: E402

from gpt import sharding  # noqa: E402
from gpt.bench.measure import random_batch  # noqa: E402
from gpt.config import ONE_DEVICE  # noqa: E402
from gpt.model import int8, transformer  # noqa: E402
from gpt.presets import preset  # noqa: E402
from gpt.sampling.language_model import LanguageModel  # noqa: E402
from gpt.training import step_functions, train_state  # noqa: E402

SEQ_LEN = {"gpt2": 256, "shakespeare-char": 64}  # others: the preset's
STEPS_PER_TURN = {"gpt2": 1}  # others: 20


def train(name: str, batch: int) -> None:
    """Training steps on random tokens; the state stays on the device."""
    config = preset(name)
    length = SEQ_LEN.get(name, config.sequence_length)
    model = dataclasses.replace(config.model, context_length=length, dropout=0.0)
    config = dataclasses.replace(
        config,
        model=model.computing_in("float32"),
        batch_size=batch,
        seq_len=length,
        grad_accum=1,
    )
    mesh = sharding.make_decoding_mesh(ONE_DEVICE)
    step, _ = step_functions.compile_steps(config, mesh)
    state = train_state.make_state(config, mesh)
    tokens = random_batch(config, mesh)
    n_steps = STEPS_PER_TURN.get(name, 20)

    def run() -> None:
        nonlocal state
        for _ in range(n_steps):
            state, metrics = step(state, tokens)
            jax.block_until_ready(metrics)

    serve(lambda: timed(run) / n_steps)


def sample(kind: str, name: str, batch: int, lengths: list[int], quantized: bool) -> None:
    """Prefill up to the first token, or decode steps; greedy. `lengths`: PROMPT, and NEW."""
    config = models.model_config(name)
    params = jax.device_put(transformer.unstack(models.random_weights(config)))
    if quantized:
        params = jax.jit(int8.quantize)(params)
    tokenizer = types.SimpleNamespace(eot_token=-1, decode_bytes=lambda ids: b"." * len(ids))
    model = LanguageModel(config, params, tokenizer, 0)
    shape = (batch, lengths[0])
    ids = np.random.default_rng(0).integers(config.vocab_size, size=shape).tolist()

    def complete(n_tokens: int) -> None:
        model.generate(ids, max_new_tokens=n_tokens, temperature=0.0, ignore_eos=True)

    if kind == "decode":
        serve(lambda: decode_step(complete, lengths[1]))
    else:
        serve(lambda: complete(1))


if __name__ == "__main__":
    kind, name, batch, *words = sys.argv[1:]
    if kind == "train":
        train(name, int(batch))
    else:
        lengths = [int(word) for word in words if word != "int8"]
        sample(kind, name, int(batch), lengths, "int8" in words)
