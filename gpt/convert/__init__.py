"""Models of others in, ours out: folders in the Hugging Face form, safetensors and JSON.

convert.py: a whole folder. hf_config.py: config.json. hf_weights.py: the tensors. hf_tokenizer.py:
the tokenizer's files. The command: `python -m gpt.convert`. No torch, no pickle, no network.
"""
