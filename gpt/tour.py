"""Write a self-contained page that walks a prompt through a model: python -m gpt.tour RUN ...

    python -m gpt.tour runs/tiny --prompt "def read(self, path):"

It shows the prompt's tokens, the shapes of all arrays, every head's attention, one query's scores,
what each layer predicts, the cache in prefill and decode, and how the settings shaped each new
token.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich import filesize

from gpt import cli, terminal
from gpt.config import BY_PLATFORM, DTYPES, Dtype, Weights, optional
from gpt.errors import UserError, require, require_file_path
from gpt.sampling.settings import Settings

EXAMPLE_PROMPT = "Tom is going to fish at the river bank."


@dataclass(frozen=True)
class TourSettings(Settings):
    """Sampler settings; those that a tour does not use are not flags."""

    logit_bias: tyro.conf.Suppress[dict[int, float]] = field(default_factory=dict)
    ignore_eos: tyro.conf.Suppress[bool] = False
    stop: tyro.conf.Suppress[tuple[str, ...]] = ()
    on_context_full: tyro.conf.Suppress[str] = "stop"
    num_samples: tyro.conf.Suppress[int] = 1
    speculate: tyro.conf.Suppress[int] = 0


@dataclass(frozen=True)
class Command:
    """Which model and prompt to use, and how to sample after it."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder made by train.py."""
    out: Annotated[Path | None, optional("FILE", "tour.html in the run's folder")] = None
    """The HTML file to write."""
    prompt: Annotated[str | None, optional("TEXT")] = None
    """Text to run through the model; --prompt=TEXT if it begins with a hyphen (default:
    "Tom is going to fish at the river bank.")."""
    prompt_ids: Annotated[str | None, optional("IDS")] = None
    """Token ids to use instead, separated by spaces: "1 2 3"."""
    settings: Annotated[TourSettings, tyro.conf.arg(name="")] = TourSettings(
        max_new_tokens=8, top_k=50, top_p=0.9
    )
    step: Annotated[int | None, optional("INT", "the newest")] = None
    """Use the checkpoint from this step."""
    dtype: Annotated[Dtype | None, optional(DTYPES, BY_PLATFORM)] = None
    """Data type to compute in."""
    weights: Annotated[Weights | None, optional("{ema,raw}", "the average if one is kept")] = None
    """Averaged (ema) or last (raw) weights."""


def main(argv: list[str]) -> None:
    command = cli.parse(Command, argv, program="python -m gpt.tour", description=__doc__)
    both = command.prompt is not None and command.prompt_ids is not None
    require(not both, "--prompt and --prompt-ids cannot be combined: choose one")
    out = command.out or command.checkpoint / "tour.html"
    if command.out:
        require_file_path("--out", out)
    prompt: str | list[int] = EXAMPLE_PROMPT
    if command.prompt_ids is not None:
        prompt = terminal.parse_ids("--prompt-ids", command.prompt_ids)
    elif command.prompt is not None:
        prompt = command.prompt

    cli.prepare_jax()
    from gpt.reports import tour, tour_recorder
    from gpt.sampling.language_model import load

    model = load(command.checkpoint, command.step, command.dtype, command.weights)
    if prompt == EXAMPLE_PROMPT:
        try:
            model.tokenizer.encode_ordinary(prompt)
        except UserError as error:
            message = f"give a prompt of your own: the example, {prompt!r}, cannot be read"
            raise UserError(f"{message}: {error}") from None
    record = tour_recorder.record_tour(model, prompt, command.settings)
    page = tour.build_tour(record, model, command.checkpoint.name)
    out.write_text(page, encoding="utf-8", errors="replace")
    print(f"tour           {out} ({filesize.decimal(out.stat().st_size)})")


if __name__ == "__main__":
    cli.run(main)
