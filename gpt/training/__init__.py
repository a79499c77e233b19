"""Pretraining: text in, weights out. Independent of sampling, which reads the checkpoints."""
