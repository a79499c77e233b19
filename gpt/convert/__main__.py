"""Import and export models as folders in the Hugging Face format: safetensors and JSON.

    python -m gpt.convert import gpt2-folder runs/gpt2
    python -m gpt.convert export runs/mine my-model

Families: GPT-2, and Llama with its close relatives Mistral, Qwen2 and Qwen3. See docs/weights.md.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt import cli
from gpt.config import Weights, optional
from gpt.wording import counted


@dataclass(frozen=True)
class Import:
    """Import a model folder as a run folder, for sample.py, train.py --init-from, gpt.bench."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """A folder with config.json, model.safetensors or its shards, and perhaps tokenizer files."""
    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")]
    """The run folder to create."""
    ids_only: bool = False
    """Leave the tokenizer out; prompts are then token ids."""


@dataclass(frozen=True)
class Export:
    """Export a run folder as a model folder that transformers loads like any other."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder."""
    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")]
    """The model folder to create."""
    step: Annotated[int | None, optional("INT", "the newest")] = None
    """Use the checkpoint from this step."""
    weights: Annotated[Weights | None, optional("{ema,raw}", "the average if one is kept")] = None
    """The average over the run, or the last weights."""


Command = (
    Annotated[Import, tyro.conf.subcommand(name="import")]
    | Annotated[Export, tyro.conf.subcommand(name="export")]
)


def main(argv: list[str]) -> None:
    command = cli.parse(Command, argv, program="python -m gpt.convert", description=__doc__)

    # Before importing JAX: use the CPU, since the model may exceed an accelerator's memory.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from gpt import flops
    from gpt.convert.convert import export_model, import_model

    def log(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    if isinstance(command, Import):
        config = import_model(command.source, command.dest, command.ids_only, log)
        summary = (
            f"{flops.parameters(config):,} weights in {config.param_dtype}, "
            f"{counted(config.n_layers, 'layer')}, context {config.context_length:,}"
        )
    else:
        values = export_model(command.checkpoint, command.dest, command.step, command.weights, log)
        summary = f"{values['architectures'][0]} in {values['dtype']}"
    print(f"{command.dest}: {summary}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
