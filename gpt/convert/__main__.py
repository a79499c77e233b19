"""Other people's weights in, ours out: folders in the Hugging Face form, safetensors and JSON.

    python -m gpt.convert import gpt2-folder runs/gpt2
    python -m gpt.convert export runs/mine my-model

Families: GPT-2, and Llama with those that are almost it (Mistral, Qwen2, Qwen3). docs/weights.md.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt import cli
from gpt.config import Weights
from gpt.errors import not_negative


@dataclass(frozen=True)
class Import:
    """A model's folder becomes a run's folder, for sample.py, train.py --init-from, gpt.bench."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """A folder with config.json, model.safetensors or its shards, and tokenizer files or none."""
    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")]
    """The run's folder to make."""
    ids_only: bool = False
    """Leave the tokenizer out: prompts are then token ids."""


@dataclass(frozen=True)
class Export:
    """A run's folder becomes a model's folder, which transformers loads without code of its own."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's folder."""
    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")]
    """The model's folder to make."""
    step: int | None = None
    """Take the checkpoint of this step (default: the newest)."""
    weights: Weights | None = None
    """The average over the run or the last weights (default: the average where one is kept)."""

    def __post_init__(self):
        not_negative("step", self.step or 0)


Command = (
    Annotated[Import, tyro.conf.subcommand(name="import")]
    | Annotated[Export, tyro.conf.subcommand(name="export")]
)


def note(text: str) -> None:
    """A line on standard error."""
    print(f"note: {text}", file=sys.stderr)


def main(argv: list[str]) -> None:
    """Convert one folder into another."""
    command = cli.parse(Command, argv, program="python -m gpt.convert", description=__doc__)
    prepare_jax()
    if isinstance(command, Import):
        bring_in(command)
    else:
        give_out(command)


def prepare_jax() -> None:
    """Set JAX up through the environment, before it is imported.

    On the CPU, since an accelerator may be smaller than the model; and not as other programs do,
    which keep freed memory: here the largest arrays come and go once.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def bring_in(command: Import) -> None:
    """Import, and say what came."""
    from gpt import flops
    from gpt.convert import incoming

    config = incoming.bring_in(command.source, command.dest, command.ids_only, note)
    print(
        f"{command.dest}: {flops.parameters(config):,} weights in {config.param_dtype}, "
        f"{config.n_layers} layers, context {config.context_length:,}",
        file=sys.stderr,
    )


def give_out(command: Export) -> None:
    """Export, and say what as."""
    from gpt.convert import outgoing

    c = command
    values = outgoing.give_out(c.checkpoint, c.dest, c.step, c.weights, note)
    print(f"{c.dest}: {values['architectures'][0]} in {values['dtype']}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
