"""A decoder-only GPT in JAX: pretrain it, sample from it, measure prefill against decode.

    import gpt

    model = gpt.load("runs/tiny")
    print(model.generate("def ", max_new_tokens=100, top_p=0.9))
    print(model.score("import os").perplexity)
    print(model.logits("import os").shape)  # tokens, vocabulary

help(gpt.LanguageModel) lists what a model can do, help(gpt.Settings) how to sample.
"""

import sys
from importlib import import_module

if sys.argv[:1] == ["-m"]:
    # This is `python -m gpt.bench` or the like, whose own imports come next. Outside the project's
    # environment they would fail with a traceback; gpt.cli says what to do instead.
    import gpt.cli  # noqa: F401

MODULES = {
    "load": "gpt.sampling.language_model",
    "LanguageModel": "gpt.sampling.language_model",
    "Settings": "gpt.sampling.settings",
    "Completion": "gpt.sampling.completion",
    "ModelConfig": "gpt.config",
    "TrainConfig": "gpt.config",
    "UserError": "gpt.errors",
}
__all__ = [*MODULES, "__version__"]


def __getattr__(name: str):
    """Public names, imported on first use so that `--help` need not wait for JAX."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("gpt-jax")
        except PackageNotFoundError:
            return "0 (not installed)"
    if name not in MODULES:
        raise AttributeError(f"module 'gpt' has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    """What TAB, dir() and help() show."""
    return sorted(__all__)
