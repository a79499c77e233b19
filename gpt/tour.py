"""One self-contained page that walks a prompt through a model: python -m gpt.tour RUN --prompt TEXT

    python -m gpt.tour runs/tiny --prompt "def read(self, path):" --out tour.html

Its tokens, the shapes on the way, every head's attention, the scores of one token, what each layer
would predict, the cache in prefill and decode, and how the settings shaped each draw.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gpt import cli, terminal
from gpt.config import Dtype, Weights
from gpt.errors import require
from gpt.sampling.settings import Settings

EXAMPLE = "Tom is going to fish at the river bank."


@dataclass(frozen=True)
class Command:
    """Which model and which prompt; how the tokens after it are drawn."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder, as train.py made it."""
    out: Path
    """The HTML file to write."""
    prompt: str | None = None
    """Text to take through the model; --prompt=TEXT where it begins with a hyphen (default:
    "Tom is going to fish at the river bank.")."""
    prompt_ids: str | None = None
    """Token ids to take through it instead, spaces between: "1 2 3"."""
    max_new_tokens: int = 8
    """Tokens to draw after it."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already in the text (1: none)."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Draw among the k likeliest tokens alone (0: all)."""
    top_p: float = 0.9
    """Draw among the fewest likeliest tokens whose probabilities reach this sum (1: all)."""
    min_p: float = 0.0
    """Draw only tokens at least this many times as likely as the likeliest (0: all)."""
    seed: int = 0
    """Seed of the draws: the same seed gives the same text."""
    step: int | None = None
    """Take the checkpoint of this step (default: the newest)."""
    dtype: Dtype | None = None
    """Type of the computation (default: float32 on CPU, bfloat16 on accelerators)."""
    weights: Weights | None = None
    """The average over the run or the last weights (default: the average where one is kept)."""

    def __post_init__(self):
        both = self.prompt is not None and self.prompt_ids is not None
        require(not both, "--prompt and --prompt-ids exclude each other: choose one")

    @property
    def start(self) -> str | list[int]:
        """The prompt, text or token ids."""
        if self.prompt_ids is not None:
            return terminal.parse_ids("--prompt-ids", self.prompt_ids)
        return EXAMPLE if self.prompt is None else self.prompt

    @property
    def settings(self) -> Settings:
        """How to draw, checked."""
        return Settings(
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
        )

    @property
    def loading(self) -> dict[str, Any]:
        """What was said of the model to load."""
        said = {"step": self.step, "dtype": self.dtype, "weights": self.weights}
        return {name: value for name, value in said.items() if value is not None}


def main(argv: list[str]) -> None:
    """Load the model, take the tour, write the page."""
    command = cli.parse(Command, argv, program="python -m gpt.tour", description=__doc__)
    with terminal.as_typed(Settings):
        settings = command.settings
    start = command.start
    cli.prepare_jax()
    from gpt.reports import html, tour, tour_recorder
    from gpt.sampling.language_model import load

    html.require_place("--out", command.out)
    model = load(command.checkpoint, **command.loading)
    require_readable(command.checkpoint, model.tokenizer, start)
    journey = tour_recorder.take_tour(model, start, settings)
    source = tour.Source(command.checkpoint, command.loading, cli.interpreter())
    html.write(command.out, tour.build(journey, model, source, settings))
    print(f"tour           {command.out} ({command.out.stat().st_size / 1e6:.2f} MB)")


def require_readable(run: Path, tokenizer, start: str | list[int]) -> None:
    """UserError for a prompt that a model without a tokenizer has no ids for."""
    from gpt.data.tokenizers import IdTokenizer

    text, nothing = isinstance(start, str) and start, not start and tokenizer.eot_token < 0
    require(
        not (isinstance(tokenizer, IdTokenizer) and (text or nothing)),
        f"{run} came without a tokenizer and cannot read text: expected token ids, as in "
        '--prompt-ids "1 2 3"',
    )


if __name__ == "__main__":
    cli.run(main)
