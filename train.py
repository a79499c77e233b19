"""Pretrain a GPT: python train.py [PRESET] [flags]. Reads from top to bottom.

    python train.py                                    tiny, on Python's standard library
    python train.py shakespeare-char --data my.txt     another preset, your own text

The same command again continues the run where it stopped.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt import cli, distributed, plan
from gpt.config import TrainConfig
from gpt.data import batches, token_files, tokenizers
from gpt.distributed import FROM_ENVIRONMENT, Processes
from gpt.errors import above_zero, not_negative, require
from gpt.presets import PRESETS
from gpt.training import board, run_dir, stop_signal


@dataclass(frozen=True)
class Command:
    """What to train, on what, and where to keep it."""

    preset: tyro.conf.Positional[Literal[tuple(PRESETS)]] = "tiny"
    """Where all settings come from that no flag gives."""
    data: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="PATH [PATH ...]")] = None
    """Text files, folders of text, or prepared tokens (default: Python's standard library)."""
    out: Path | None = None
    """Folder of the run (default: runs/PRESET). If it holds a run, that run continues."""
    overwrite: bool = False
    """Start afresh: remove the run that --out holds."""
    init_from: Path | None = None
    """Start from the weights, the tokenizer and the model's settings of another run."""
    dry_run: bool = False
    """Print what this would train, and stop."""
    verify_resume: bool = False
    """Prove on a few steps that stopping and continuing changes no bit; exit code 1 if it does."""
    memory_gb: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """With --dry-run: memory of one device, in 10^9 bytes (default: what is found here)."""
    devices: int | None = None
    """With --dry-run: plan for so many devices that need not be here, virtual ones of this CPU."""
    topology: str | None = None
    """With --dry-run: plan for TPUs that need not be here, by their own compiler: v5e:16x16."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, in DIR/tensorboard (needs tensorboardX)."""
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Steps to trace for XProf after a short warm-up, in DIR/profile; 0: none."""
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = FROM_ENVIRONMENT
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = PRESETS["tiny"]

    def __post_init__(self):
        require(self.data != (), "--data names nothing: expected one path or several behind it")
        not_negative("profile", self.profile)
        above_zero("memory_gb", 1.0 if self.memory_gb is None else self.memory_gb)
        if self.tensorboard:
            board.require_installed()


def main(argv: list[str]) -> int:
    """Read the flags, prepare JAX, train; the exit code."""
    cli.require_full_words(argv)
    preset = cli.peek(Command, argv, "preset", default=Command())
    default = Command(preset=preset, train=PRESETS.get(preset, PRESETS["tiny"]))
    read = partial(cli.parse, Command, argv, program="train.py", description=__doc__)
    command = read(default=default)
    if plan.wants_absent_devices(command):
        cli.prepare_absent()
        from gpt.plan.absent import print_plan

        return print_plan(command, PRESETS[command.preset])
    out = command.out or Path("runs") / command.preset
    trying = command.dry_run or command.verify_resume  # which leaves nothing behind
    cli.prepare_jax(cache=command.compile_cache and not trying)
    # Before anything asks for a device.
    say = partial(print, file=sys.stderr, flush=True)
    distributed.connect(command.processes, os.environ, say)
    from gpt.training import memory_plan, metrics, resume

    if command.init_from:
        command = read(default=resume.adopt(default, command, out))
    console = metrics.make_console(quiet=not distributed.is_first())
    held = contextlib.nullcontext() if trying else distributed.on_first_process(run_dir.hold(out))
    signals, enough = (
        stop_signal.StopSignal(console.print, console.show_cursor),
        memory_plan.explained,
    )
    with signals, distributed.report_lost_peer(), held, enough(command.train):
        return train(command, out, console, signals, cache(console.print))


@distributed.exit_together()
def look(command: Command, out: Path, console, tell: Callable[[str], None]) -> tuple:
    """Refuse all that can be refused, in all processes: what is found. Nothing is changed."""
    from gpt import checkpoint, sharding
    from gpt.sampling.language_model import platform_dtype
    from gpt.training import dataset, plan, resume, train_step

    trying = command.dry_run or command.verify_resume
    (run_dir.require_folder if trying else run_dir.require_shared)(out)
    alone = not (command.verify_resume and distributed.is_multi_process())
    require(alone, "--verify-resume proves a run of one process: add --num-processes 1")
    resuming = bool(checkpoint.steps(out)) and not (command.overwrite or command.verify_resume)
    source = out if resuming else command.init_from
    about = resume.newest(source, checkpoint.read_metadata, tell) if source else None
    if about and not resuming:
        about = {"tokenizer": about["tokenizer"]}  # all that a new run takes beside the weights
    kept = None if trying else cli.cache_folder() / "tokens"  # it leaves nothing behind
    mesh = sharding.make_mesh(command.train.mesh)  # before there is work to wait for
    tokenizer, text = dataset.prepare(command.train, command.data or (), about, kept, console)
    config = dataset.settle(command.train, tokenizer, platform_dtype())
    if resuming:
        resume.require_same_text(about, text.fingerprint)
        resume.require_same_run(out, about, config)
        command = replace(command, init_from=about.get("init_from"))  # as when it began
    batches.require_length(text.train, config.window)
    lines = train_step.require_fit(config, mesh) + plan.describe(config, mesh.size, len(text.train))
    console.print(*lines, sep="\n")
    return command, config, mesh, tokenizer, text, source, resuming


def train(command: Command, out: Path, console, signals, tell: Callable[[str], None]) -> int:
    """Look at all that can be refused, then run."""
    from gpt import checkpoint
    from gpt.training import plan, profile, saving, verify

    command, config, mesh, tokenizer, dataset, source, resuming = look(command, out, console, tell)
    about = {"the settings": (config, command.overwrite), "the text": dataset.fingerprint}
    found = {"what they find in --out": (resuming, checkpoint.steps(source) if source else [])}
    distributed.require_same(about | found)
    if command.dry_run:
        console.print(*plan.describe_memory(config, mesh, command.memory_gb), sep="\n")
        return 0

    run = Run(out, console, command, config, mesh, tokenizer, dataset, signals, config.steps)
    if command.verify_resume:
        return verify.verify_run(run, source, tell)
    plan.require_room(config, mesh)
    state = saving.begin(config, mesh, source, resuming, tell)
    first = int(state.step)
    if not first:  # or the command that stopped could not continue
        profile.require_steps(command.profile, config.steps)
    code = run.execute(state, first) if first < config.steps else run.complete()
    sample = shlex.join([cli.interpreter(), "sample.py", str(out), "--prompt", "TEXT"])
    console.print(f"sample it      {sample}")
    return code


@dataclass
class Run:
    """The loop, and what it works with."""

    out: Path
    console: Any
    command: Command
    config: TrainConfig
    mesh: Any
    tokenizer: tokenizers.Tokenizer
    dataset: token_files.Dataset
    signals: stop_signal.StopSignal
    until: int  # the last step to make, for now

    def complete(self) -> int:
        """Say that there is nothing left to do."""
        if not (self.out / "loss.png").exists():
            self.draw()  # a process that was killed at its end did not
        self.console.print(f"complete       {self.config.steps:,} steps; --overwrite starts afresh")
        return 0

    def execute(self, state, first: int) -> int:
        """Train from step `first` to the last, or to a signal; the exit code."""
        from gpt import checkpoint, hardware
        from gpt.compile_log import Stopwatch
        from gpt.training import feed, metrics, nonfinite, profile, train_step

        out, c, writes, n = self.out, self.config, distributed.is_first(), self.command.profile
        if first:
            self.console.print(f"continues      from step {first:,}")
        self.batch = partial(feed.batch, c, self.dataset.train, self.mesh)  # of a step's number
        self.signals.defer(first)  # from here on: compiling must not be broken off
        with Stopwatch() as watch:
            steps = train_step.compile_steps(c, self.mesh)
        self.console.print(f"compiled       in {watch.compile_seconds:.1f} s")
        self.settle_in(first)  # only now: what does not fit was refused
        peak = hardware.matmul_rate(c.model.compute_dtype) * self.mesh.size
        events = self.command.tensorboard and writes and board.Board(out / "tensorboard", first)
        tracing = profile.Profile(out / "profile", n if writes else 0, first, self.console.print)
        path = out / "metrics.jsonl" if writes else None
        with (
            checkpoint.Writer(out, c.keep, c.keep_best, resumed=first or None) as self.writer,
            metrics.RunLog(path, first, c, self.console, peak, events or None) as self.log,
            contextlib.closing(tracing) as self.profile,
        ):
            self.bad = nonfinite.BadSteps(c, first - int(train_step.count_updates(state.optimizer)))
            self.loop(state, first, *steps)
        self.draw()
        if code := distributed.agree_on_code(self.signals.code):
            same = "the same command" + " without --overwrite" * self.command.overwrite
            self.console.print(f"stopped        {same} continues the run")
        return code

    @distributed.exit_together()
    def settle_in(self, first: int) -> None:
        """Remove the run that --overwrite gives up; write the tokenizer."""
        from gpt.training import resume

        if distributed.is_first():
            if self.command.overwrite and not first:
                resume.remove_run(self.out)
            tokenizers.save(self.tokenizer, self.out / "tokenizer.json")

    def draw(self) -> None:
        """The picture of the losses."""
        from gpt.training import metrics

        if distributed.is_first():
            metrics.draw_curves(self.out / "metrics.jsonl", self.out / "loss.png")
        self.console.print(f"loss curve     {self.out / 'loss.png'}")

    def loop(self, state, first: int, train_step, eval_step) -> None:
        """Step by step; each one's metrics are looked at when the device has the next."""
        import jax

        c, last, late = self.config, self.until, None
        with contextlib.closing(batches.prefetch(self.batch, first, last)) as queue:
            for done, tokens_ABU in enumerate(queue, first + 1):
                state, metrics = train_step(state, tokens_ABU)
                self.profile.note(done, metrics)
                if late:
                    self.take_note(done - 1, jax.block_until_ready(late), state)
                late, ending = metrics, self.signals.ends(done)
                due = self.due(done, c.eval_every, c.sample_every, c.save_every)
                if ending or due or self.bad.is_last_chance:
                    self.take_note(done, jax.block_until_ready(late), state)
                    late = None
                    with self.log.speed.pause():
                        ending = self.look_up(state, eval_step, done)
                if ending:
                    break

    def take_note(self, done: int, metrics, state) -> None:
        """Log step `done`; Failed if it is one too many in a row whose update was skipped."""
        from gpt.training import nonfinite

        self.log.log_train(done, metrics)
        if self.bad.note(done, int(metrics["skipped"])):
            self.writer.wait()
            raise nonfinite.diverged(self.config, self.bad, self.out, state.params, self.batch)

    def look_up(self, state, eval_step, done: int) -> bool:
        """Evaluate, show a sample, save, as due. Whether it was the last: a skipped one is not."""
        from gpt.training import train_step

        c, loss, kept = self.config, None, state.average or state.params
        saving = self.due(done, c.save_every)
        if self.due(done, c.eval_every) or (saving and c.keep_best):
            loss, bits = train_step.evaluate(c, kept, eval_step, self.dataset.val)
            self.log.log_eval(done, loss, bits)
        if self.due(done, c.sample_every):
            self.show_sample(kept, done)
        ending = done == self.until or (self.signals.ends(done) and not self.bad.row)
        if ending or saving:
            self.save(state, done, loss, ending)
        return ending

    def due(self, done: int, *intervals: int) -> bool:
        """Whether an interval, in steps, ends with step `done` or with the run; 0 never does."""
        return any(n and (done == self.until or done % n == 0) for n in intervals)

    def show_sample(self, params, done: int) -> None:
        """Print what the model writes now, from nothing: the first process does it alone."""
        import jax

        from gpt.model.transformer import unstack
        from gpt.sampling.language_model import LanguageModel

        if not (params := distributed.copy_to_first_process(params)):
            return
        model = LanguageModel(self.config.model, jax.jit(unstack)(params), self.tokenizer, step=0)
        text = str(model.generate(max_new_tokens=120))
        self.console.print(f"--- sample ---\n{text}\n---")
        self.log.log_sample(done, text)

    def save(self, state, done: int, loss: float | None, ending: bool) -> None:
        """Write a checkpoint in the background; at the end of the run, until it is on disk."""
        from gpt.training import dataset, saving

        if self.bad.row:  # it may go on like this: these weights must not push out good ones
            self.console.print(f"note: step {done} is not saved: its update was skipped")
            return
        about = dataset.describe_run(self.command, self.config, self.tokenizer, self.dataset)
        saving.save(self.writer, self.config, done, state, about, loss, ending, self.console.print)


if __name__ == "__main__":
    cli.run(main)
