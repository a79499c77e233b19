"""This project, as its users run it:

python ours.py train NAME BATCH
python ours.py prefill|decode NAME BATCH PROMPT [NEW] [int8]
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
from gpt.training import train_state, train_step  # noqa: E402

STEPS = {"gpt2": 1, "shakespeare-char": 20}  # training steps a turn
SEQ_LEN = {"gpt2": 256, "shakespeare-char": 64}


def train(name: str, batch: int) -> None:
    """Training steps, the state on the device."""
    config = preset(name)
    length = SEQ_LEN[name]
    model = dataclasses.replace(config.model, context_length=length, dropout=0.0)
    model = dataclasses.replace(model.computing_in("float32"), vocab_size=config.model.vocab_size)
    config = dataclasses.replace(
        config, model=model, batch_size=batch, seq_len=length, grad_accum=1
    )
    mesh = sharding.make_decoding_mesh(ONE_DEVICE)
    step, _ = train_step.compile_steps(config, mesh)
    held = {"state": train_state.make_state(config, mesh)}
    tokens = random_batch(config, mesh)

    def work() -> float:
        def run():
            for _ in range(STEPS[name]):
                held["state"], metrics = step(held["state"], tokens)
                jax.block_until_ready(metrics)

        return timed(run) / STEPS[name]

    serve(work)


def complete(name: str, batch: int, prompt: int, new: int | None, quantized: bool) -> None:
    """Prefill to the first token, or decode steps; greedy."""
    config = models.model_config(name)
    params = jax.device_put(transformer.unstack(models.random_weights(config)))
    params = jax.jit(int8.quantize)(params) if quantized else params
    letters = types.SimpleNamespace(eot_token=-1, decode_bytes=lambda ids: b"." * len(ids))
    model = LanguageModel(config, params, letters, 0)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(batch, prompt)).tolist()

    def run(n: int):
        return model.generate(ids, max_new_tokens=n, temperature=0.0, ignore_eos=True)

    serve((lambda: decode_step(run, new)) if new else (lambda: run(1) and None))


if __name__ == "__main__":
    kind, name, batch, *words = sys.argv[1:]
    if kind == "train":
        train(name, int(batch))
    else:
        prompt, *new = [int(word) for word in words if word != "int8"]
        complete(name, int(batch), prompt, new[0] if new else None, "int8" in words)
