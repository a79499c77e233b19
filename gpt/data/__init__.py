"""From text to batches of tokens: corpora, tokenizers, token files, batches. Imports no JAX."""
