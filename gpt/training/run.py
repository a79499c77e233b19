"""A run outside its loop: its text, whether it is possible, taking its folder over, its end."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from gpt import checkpoint, distributed
from gpt.config import TrainConfig
from gpt.data import batches, tokenizers
from gpt.data.dataset import load_dataset
from gpt.data.progress import tokenizing_bar
from gpt.data.token_files import Dataset
from gpt.errors import require
from gpt.training import memory_plan, run_dir, step_functions
from gpt.training.loss_curve import save_loss_curve
from gpt.training.metrics import read_metrics
from gpt.training.resume import StartingPoint, require_same_settings
from gpt.training.stop_signal import StopSignal

PROFILE_AFTER = 3  # steps: the first ones still wait for data and memory


def load_text(
    args: Any, start: StartingPoint, store: Path, console: Console
) -> tuple[tokenizers.Tokenizer, Dataset]:
    """The tokenizer and the tokens of --data. A run that continues keeps its tokenizer and must
    have the same text; one that starts from other weights keeps theirs."""
    with tokenizing_bar(console) as report:
        return load_dataset(
            args.data or (),
            os.path.expanduser(args.config.tokenizer),
            args.config.vocab_size,
            args.data_options,
            store=store,
            keep=not args.is_trial,
            estimate=args.dry_run,
            saved_tokenizer=start.metadata["tokenizer"] if start.metadata else None,
            expected=start.metadata["data"] if start.resuming else None,
            log=console.print,
            progress=report,
        )


@dataclass
class Run:
    """A run, once its text, settings and devices are known.

    `args`: the flags of train.py. `config`: the settings to train with; auto_settings.py replaces
    them if a step is measured, or does not fit into memory.
    """

    args: Any
    out: Path
    start: StartingPoint
    config: TrainConfig
    mesh: Mesh
    tokenizer: tokenizers.Tokenizer
    dataset: Dataset
    console: Console
    stop: StopSignal

    @property
    def minutes(self) -> float | None:
        """Minutes to train, while the number of steps is still unknown; else None."""
        return None if self.start.resuming else self.args.minutes

    def require_possible(self) -> None:
        """Raise UserError unless the run can do what was asked for, with its text and devices."""
        args, config, start = self.args, self.config, self.start
        for note in step_functions.require_even_split(config, self.mesh):
            self.console.print(note)
        batches.require_length(self.dataset.train, config.sequence_length)
        if not args.dry_run:
            memory_plan.require_room(memory_plan.least_need(config, self.mesh))
        if config.warmup_steps > max(config.schedule_steps - 2, 0) and not start.resuming:
            self.console.print(
                f"note: a warm-up of {config.warmup_steps:,} steps takes the whole run of "
                f"{config.schedule_steps:,}: the learning rate rises until the last step; try "
                f"--warmup-steps {config.schedule_steps // 10}"
            )
        if start.resuming:
            require_same_settings(start, config)
            require(
                config.extra_steps == 0 or config.min_learning_rate > 0,
                "--extend trains at the last learning rate of the schedule, which is 0: "
                f"--init-from {self.out} --out ANOTHER starts a new schedule from these weights",
            )
        else:
            require(
                args.profile <= max(config.steps - PROFILE_AFTER, 0),
                f"--profile {args.profile} traces steps after the first {PROFILE_AFTER}, but the "
                f"run has {config.steps} steps: ask for fewer, or for more --steps",
            )
        if args.log_to:
            from gpt.training import trackers

            trackers.require_installed(args.log_to)
        require(
            not (args.verify_resume and distributed.is_multi_process()),
            "--verify-resume works with one process alone: add --num-processes 1",
        )

    def require_same_everywhere(self) -> None:
        """Raise UserError in all processes of the run unless all have the same settings and text,
        and find the same checkpoints."""
        source = self.start.source
        found = checkpoint.saved_steps(source) if source else []
        distributed.require_same(
            {
                "the settings": (self.args.config, self.config.model, self.args.overwrite),
                "the text": self.dataset.fingerprint,
                "what they find in --out": (self.start.resuming, found),
            }
        )
        require_same_choices(self.config)

    def take_over_folder(self, steps_done: int) -> None:
        """Delete the run that --overwrite replaces, and write the tokenizer."""
        if steps_done:
            self.console.print(f"continues      from step {steps_done:,}")
        with distributed.fail_together():
            if distributed.is_first():
                if self.args.overwrite and steps_done == 0:
                    run_dir.remove_run(self.out)
                tokenizers.save(self.tokenizer, self.out / "tokenizer.json")

    def finish(self) -> int:
        """Plot the losses and return the exit code, which is not 0 if the run was stopped."""
        if distributed.is_first():
            save_loss_curve(self.out / "metrics.jsonl", self.out / "loss.png")
        self.console.print(f"loss curve     {self.out / 'loss.png'}")

        # sample.py uses the latest checkpoint. An earlier one may have a lower validation loss.
        losses = {}
        for record in read_metrics(self.out / "metrics.jsonl"):
            if record.get("val_loss") is not None:
                losses[record["step"]] = record["val_loss"]
        saved = checkpoint.saved_steps(self.out)
        best = min((step for step in saved if step in losses), key=losses.get, default=saved[-1])
        if best != saved[-1]:
            self.console.print(
                f"note: step {best:,} has the best validation loss, {losses[best]:.4f}: add "
                f"--step {best} to sample.py"
            )
        return distributed.agree_on_code(self.stop.code)


def require_same_choices(config: TrainConfig) -> None:
    """Raise UserError in all processes unless `auto` means the same in each."""
    chosen = "--grad-accum and --remat, which auto chooses by the memory of each process: give both"
    distributed.require_same({chosen: (config.grad_accum, config.remat, config.unroll)})
