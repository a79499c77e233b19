"""From prompt to text: prefill, decode, sample, stop. Independent of training."""
