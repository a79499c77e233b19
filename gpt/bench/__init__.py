"""What the two regimes cost on this machine: `python -m gpt.bench`.

Prefill and decode are timed apart, compilation apart from both, and each is set against a ceiling
that was measured here: how fast this machine multiplies, how fast it reads.
"""
