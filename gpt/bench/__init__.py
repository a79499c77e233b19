"""How fast this machine samples and trains, beside how fast it could: `python -m gpt.bench`.

Prefill and decode are timed apart, and compilation apart from both. Each is compared with a ceiling
measured on the same machine: how fast it multiplies matrices, how fast it reads memory.
"""
