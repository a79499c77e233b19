"""GPT-2 of Hugging Face transformers on torch: decode or prefill by `generate`, greedy."""

import os
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from turns import decode_step, serve

assert sys.argv[2] == "gpt2"  # its config's defaults are GPT-2 small
torch.set_num_threads(os.cpu_count())
kind, _, batch, prompt, *new = sys.argv[1:]
config = GPT2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0)
model = GPT2LMHeadModel(config).eval()
ids = torch.randint(config.vocab_size, (int(batch), int(prompt)))


def run(n: int):
    """`n` new tokens after each prompt."""
    with torch.inference_mode():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
        )


serve(
    (lambda: decode_step(run, int(new[0])))
    if kind == "decode"
    else (lambda: run(1) is None or None)
)
