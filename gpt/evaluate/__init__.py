"""How good a model is: tasks of the field's harness, lm-eval, on our engine."""
