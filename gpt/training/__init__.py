"""Pretraining: text in, weights out. Knows nothing of sampling, which reads what it leaves."""
