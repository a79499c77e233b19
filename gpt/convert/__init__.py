"""Other people's weights in, ours out: safetensors and JSON, no torch, no pickle.

`python -m gpt.convert`. fields.py: config.json; layout.py: which tensor is which of our weights;
tensorfile.py: safetensors; tokenizers_in.py and tokenizers_out.py: their tokenizers; incoming.py
and outgoing.py: a whole folder. A file may come from anyone: nothing in it is trusted.
"""
