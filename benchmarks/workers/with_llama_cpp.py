"""llama.cpp through llama-cpp-python: FILE decode|prefill NAME 1 PROMPT [NEW], FILE its weights.

Its C functions are called straight: no sampling, no copies of logits, no Python between tokens but
one call. Its defaults stand (a cache in f16, fused attention) but for threads: all cores.
"""

import os
import sys

import llama_cpp
from turns import serve, timed

file, kind, _, batch, prompt, *new = sys.argv[1:]
assert batch == "1"
prompt, new = int(prompt), int(new[0]) if new else 0
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
options = llama_cpp.llama_context_default_params()
options.n_ctx = prompt + new
options.n_batch = options.n_ubatch = 512
options.n_threads = options.n_threads_batch = os.cpu_count()
context = llama_cpp.llama_init_from_model(model, options)
memory = llama_cpp.llama_get_memory(context)
ids = (llama_cpp.llama_token * prompt)(*range(prompt))


def read(tokens, n: int) -> None:
    """Logits after the last of `n` tokens, on top of what was read before."""
    failed = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, n))
    assert not failed
    llama_cpp.llama_synchronize(context)


def prefill() -> None:
    """Read the prompt from nothing."""
    llama_cpp.llama_memory_clear(memory, False)
    read(ids, prompt)


def decode() -> float:
    """Seconds a token on top of the prompt."""
    prefill()
    return timed(lambda: [read(ids, 1) for _ in range(new)]) / new


serve(decode if kind == "decode" else prefill)
