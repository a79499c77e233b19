"""From a prompt to text: prefill, decode, draw, stop. Knows nothing of training."""
