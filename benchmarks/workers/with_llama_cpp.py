"""llama.cpp through llama-cpp-python.

    python benchmarks/workers/with_llama_cpp.py FILE prefill NAME 1 PROMPT
    python benchmarks/workers/with_llama_cpp.py FILE decode NAME 1 PROMPT NEW

FILE holds the weights. The C functions are called directly: no sampling, no copies of logits, and
one Python call per token. Its defaults stand (a cache in float16, fused attention), but all cores
are used.
"""

import os
import sys

import llama_cpp
from turns import serve, timed

file, kind, _, batch, *lengths = sys.argv[1:]
assert batch == "1"
n_prompt = int(lengths[0])
n_new = int(lengths[1]) if kind == "decode" else 0

silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
options = llama_cpp.llama_context_default_params()
options.n_ctx = n_prompt + n_new
options.n_batch = options.n_ubatch = 512
options.n_threads = options.n_threads_batch = os.cpu_count()
context = llama_cpp.llama_init_from_model(model, options)
memory = llama_cpp.llama_get_memory(context)
ids = (llama_cpp.llama_token * n_prompt)(*range(n_prompt))


def read(n_tokens: int) -> None:
    """Compute the logits after `n_tokens` tokens on top of those read before."""
    failed = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, n_tokens))
    assert not failed
    llama_cpp.llama_synchronize(context)


def prefill() -> None:
    """Read the prompt into an empty cache."""
    llama_cpp.llama_memory_clear(memory, False)
    read(n_prompt)


def read_new_tokens() -> None:
    for _ in range(n_new):
        read(1)


def decode() -> float:
    """Seconds per token on top of the prompt."""
    prefill()
    return timed(read_new_tokens) / n_new


serve(decode if kind == "decode" else prefill)
