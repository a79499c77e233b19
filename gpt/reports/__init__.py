"""Pages to look at: a run as it learns (report), a prompt on its way through the model (tour).

One self-contained file each: no network, no server. Numbers come from runs and from the model's
own forward pass; nothing here computes a Transformer of its own.
"""
