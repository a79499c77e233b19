"""nanoGPT's training step, from its own folder.

python benchmarks/workers/with_nanogpt.py FOLDER eager|compiled train gpt2|shakespeare-char BATCH
"""

import contextlib
import os
import sys

import torch
from turns import serve, timed

folder, mode, _, name, batch = sys.argv[1:]
sys.path.insert(0, folder)
from model import GPT, GPTConfig  # noqa: E402

SHAPES = {
    "gpt2": {"block_size": 256, "bias": True},
    "shakespeare-char": {
        "block_size": 64,
        "vocab_size": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "bias": False,
    },
}
STEPS_PER_TURN = {"gpt2": 1, "shakespeare-char": 20}

torch.set_num_threads(os.cpu_count())
with contextlib.redirect_stdout(sys.stderr):  # it prints; standard output is for peers.py
    model = GPT(GPTConfig(dropout=0.0, **SHAPES[name]))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
forward = torch.compile(model) if mode == "compiled" else model
tokens = torch.randint(model.config.vocab_size, (int(batch), model.config.block_size + 1))


def run() -> None:
    """Optimizer steps, as nanoGPT's train.py makes them."""
    for _ in range(STEPS_PER_TURN[name]):
        _, loss = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


serve(lambda: timed(run) / STEPS_PER_TURN[name])
