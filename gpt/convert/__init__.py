"""Models of others in, ours out: folders in the Hugging Face form. `python -m gpt.convert`."""
