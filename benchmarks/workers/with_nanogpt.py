"""nanoGPT's training step from its own folder: FOLDER eager|compiled train PRESET BATCH."""

import contextlib
import os
import sys

import torch
from turns import serve, timed

folder, mode, _, name, batch = sys.argv[1:]
sys.path.insert(0, folder)
from model import GPT, GPTConfig  # noqa: E402

SHAPES = {
    "gpt2": ({"block_size": 256, "bias": True}, 1),
    "shakespeare-char": (
        {"block_size": 64, "vocab_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128}
        | {"bias": False},
        20,
    ),
}
torch.set_num_threads(os.cpu_count())
shape, steps = SHAPES[name]
with contextlib.redirect_stdout(sys.stderr):  # it is talkative, and its driver listens
    model = GPT(GPTConfig(dropout=0.0, **shape))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
run = torch.compile(model) if mode == "compiled" else model
shape = (int(batch), model.config.block_size + 1)
tokens = torch.randint(model.config.vocab_size, shape)


def step() -> None:
    """One optimizer step, as nanoGPT's train.py makes it."""
    _, loss = run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


serve(lambda: timed(lambda: [step() for _ in range(steps)]) / steps)
