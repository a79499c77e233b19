"""Sampling settings, validated at construction. Imports no JAX."""

import math
from dataclasses import dataclass, field
from typing import Literal

from gpt.errors import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    check_fields,
    require,
)

MAX_TEMPERATURE = 1e30  # within float32; all tokens are equally likely well below it
Full = Literal["auto", "stop", "error", "slide"]
Prefix = Literal["bos", "eos", "none"]  # what precedes a text


@dataclass(frozen=True)
class Settings:
    """How to complete a prompt. Filters apply in the order of their fields."""

    max_new_tokens: PositiveInt = 200
    """Maximum number of tokens per completion."""
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    """Bias to add to a token's logit: its id, then the amount (-inf forbids it)."""
    repetition_penalty: PositiveFloat = 1.0
    """Divide positive and multiply negative logits of tokens in the text by this (1: off)."""
    ignore_eos: bool = False
    """Never sample end-of-text."""
    temperature: NonNegativeFloat = 0.8
    """Divide the logits by this; 0 always takes the likeliest token."""
    top_k: NonNegativeInt = 0
    """Sample only from the k likeliest tokens (0: all)."""
    top_p: Probability = 1.0
    """Sample only from the fewest likeliest tokens whose probabilities reach this (1: all)."""
    min_p: Probability = 0.0
    """Sample only tokens with at least this share of the likeliest token's probability (0: all)."""
    stop: tuple[str, ...] = ()
    """Stop before this text, without printing it."""
    on_context_full: Full = "auto"
    """When the context is full: auto rereads its last half and continues; slide does too, and also
    accepts prompts that are too long; stop ends the text; error fails."""
    num_samples: PositiveInt = 1
    """Completions per prompt, from one prefill."""
    seed: int = 0
    """Random seed; the same seed gives the same text."""
    speculate: NonNegativeInt = 0
    """Propose up to this many tokens per step, those that followed the latest tokens earlier in the
    text, and read them together. The text stays the same; repetitive text is faster (0: off)."""

    def __post_init__(self):
        check_fields(self)
        require(
            self.max_new_tokens < 2**31,
            f"max_new_tokens is {self.max_new_tokens}: expected less than 2^31",
        )
        require(
            self.temperature <= MAX_TEMPERATURE,
            f"temperature is {self.temperature}: expected at most {MAX_TEMPERATURE:g}",
        )
        for token, bias in self.logit_bias.items():
            require(  # refuses NaN too
                bias < math.inf,
                f"logit_bias of token {token} is {bias}: expected a number or -inf",
            )
        require(all(self.stop), "stop is an empty text: expected at least one character")
        require(not isinstance(self.stop, str), f"stop is {self.stop!r}: expected a list of texts")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}: expected 0 <= seed < 2^31")
