"""Evaluation on the tasks of lm-eval, with our engine."""
