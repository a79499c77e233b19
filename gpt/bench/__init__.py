"""How fast this machine samples and trains, relative to its peak: `python -m gpt.bench`.

Prefill, decode and compilation are timed separately. Rates are compared with ceilings measured on
the same machine: how fast it multiplies matrices and how fast it reads memory.
"""
