"""GPT-2 of Hugging Face transformers on torch, greedy, by its own `generate`.

python benchmarks/workers/with_transformers.py prefill gpt2 BATCH PROMPT
python benchmarks/workers/with_transformers.py decode gpt2 BATCH PROMPT NEW
"""

import os
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from turns import decode_step, serve

kind, name, batch, *lengths = sys.argv[1:]
assert name == "gpt2"  # the defaults of GPT2Config are GPT-2 small
torch.set_num_threads(os.cpu_count())
config = GPT2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0)
model = GPT2LMHeadModel(config).eval()
ids = torch.randint(config.vocab_size, (int(batch), int(lengths[0])))
mask = torch.ones_like(ids)


def complete(n_tokens: int) -> None:
    """`n_tokens` new tokens after each prompt."""
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False)


if kind == "decode":
    serve(lambda: decode_step(complete, int(lengths[1])))
else:
    serve(lambda: complete(1))
