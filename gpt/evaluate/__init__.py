"""Evaluation on lm-eval tasks with our engine."""
