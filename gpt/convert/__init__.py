"""Importing and exporting models in the Hugging Face format: `python -m gpt.convert`."""
