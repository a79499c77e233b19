"""How to complete prompts, checked at construction. Starts no JAX."""

from dataclasses import dataclass

from gpt.errors import require


@dataclass(frozen=True)
class Settings:
    """How to complete prompts."""

    max_new_tokens: int = 200
    """Most tokens to draw for each completion."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens alone (0: all)."""
    num_samples: int = 1
    """Completions of each prompt, from one prefill."""
    seed: int = 0
    """Seed of the draws: the same seed gives the same text."""

    def __post_init__(self):
        require(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}: expected >= 1")
        require(self.num_samples >= 1, f"num_samples is {self.num_samples}: expected at least 1")
        require(
            0 <= self.temperature < float("inf"),
            f"temperature is {self.temperature}: expected zero or more",
        )
        require(self.top_k >= 0, f"top_k is {self.top_k}: expected zero or more")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}: expected 0 <= seed < 2^31")
