"""Pretrain a GPT: python train.py [PRESET] [flags]. Reads from top to bottom.

    python train.py                                    tiny, on Python's standard library
    python train.py shakespeare-char --data my.txt     another preset, your own text

The same command again continues the run where it stopped.
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt import cli
from gpt import tokenizer as tokenizers
from gpt.config import TrainConfig
from gpt.errors import above_zero, not_negative
from gpt.presets import PRESETS
from gpt.training import board, data, lock, shards, stop

SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Command:
    """What to train, on what, and where to keep it."""

    preset: tyro.conf.Positional[Literal[tuple(PRESETS)]] = "tiny"
    """Where all settings come from that no flag gives."""
    data: tuple[Path, ...] = ()
    """Text files, folders of text, or prepared tokens (default: Python's standard library)."""
    out: Path | None = None
    """Folder of the run (default: runs/PRESET). If it holds a run, that run continues."""
    overwrite: bool = False
    """Start afresh: remove the run that --out holds."""
    init_from: Path | None = None
    """Start from the weights and the tokenizer of another run."""
    dry_run: bool = False
    """Print what this would train, and stop."""
    verify_resume: bool = False
    """Prove on a few steps that stopping and continuing changes no bit; exit code 1 if it does."""
    memory_gb: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """With --dry-run: memory of one device, in 10^9 bytes (default: what is found here)."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, in DIR/tensorboard (needs tensorboardX)."""
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Steps to trace for XProf after a short warm-up, in DIR/profile; 0: none."""
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = PRESETS["tiny"]

    def __post_init__(self):
        not_negative("profile", self.profile)
        above_zero("memory_gb", 1.0 if self.memory_gb is None else self.memory_gb)
        if self.tensorboard:
            board.require_installed()


def main(argv: list[str]) -> int:
    """Read the flags, prepare JAX, train; the exit code."""
    preset = cli.peek(Command, argv, "preset", default=Command())
    default = Command(preset=preset, train=PRESETS.get(preset, PRESETS["tiny"]))
    command = cli.parse(Command, argv, program="train.py", description=__doc__, default=default)
    out = command.out or Path("runs") / command.preset
    trying = command.dry_run or command.verify_resume  # which leaves nothing behind
    cli.prepare_jax(cache=command.compile_cache and not trying)
    from rich.console import Console

    from gpt.training import memory

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    held = contextlib.nullcontext(lock.require_folder(out)) if trying else lock.hold(out)
    signals, enough = stop.StopSignal(console.print, console.show_cursor), memory.explained
    with signals, held, enough(command.train):
        return train(command, out, console, signals)


def train(command: Command, out: Path, console, signals: stop.StopSignal) -> int:
    """Look at all that can be refused; then change what is on disk, and run."""
    from gpt import checkpoint, sharding
    from gpt.training import plan, prepare, profile, resume, saving, step

    trying = command.dry_run or command.verify_resume
    resuming = bool(checkpoint.steps(out)) and not (command.overwrite or command.verify_resume)
    source = out if resuming else command.init_from
    tell = cache(console.print)  # of each damaged checkpoint once
    about = resume.newest(source, checkpoint.read_metadata, tell) if source else None
    if about and not resuming:
        about = {"tokenizer": about["tokenizer"]}  # all that a new run takes beside the weights
    kept = None if trying else cli.cache_folder() / "tokens"  # it leaves nothing behind
    tokenizer, dataset = prepare.prepare(command.train, command.data, about, kept, console)
    config = settle(command.train, tokenizer)
    if resuming:
        resume.require_same_text(about, dataset.fingerprint)
        resume.require_same_run(out, about, config)
    data.require_length(dataset.train, config.window)
    mesh = sharding.make_mesh(config.mesh)
    step.require_fit(config, mesh)
    for line in plan.describe(config, mesh.size, len(dataset.train)):
        console.print(line)
    if command.dry_run:
        for line in plan.describe_memory(config, mesh, command.memory_gb):
            console.print(line)
        return 0

    run = Run(out, console, command, config, mesh, tokenizer, dataset, signals, config.steps)
    if command.verify_resume:
        return verify(run, source, tell)
    plan.require_room(config, mesh)
    state = saving.begin(config, mesh, source, resuming, tell)
    first = int(state.step)
    profile.require_steps(command.profile, first, config.steps)
    if command.overwrite:
        resume.remove_run(out)
    code = run.execute(state, first) if first < config.steps else run.complete()
    console.print(f"sample it      python sample.py {shlex.quote(str(out))} --prompt TEXT")
    return code


def verify(run: "Run", source: Path | None, tell: Callable[[str], None]) -> int:
    """Stop and continue in a folder that does not stay, and go there at once: the exit code."""
    from rich.console import Console

    from gpt.training import saving, verify

    config, n = verify.shorten(run.config)
    command = dataclasses.replace(run.command, profile=0, tensorboard=False)
    run = dataclasses.replace(run, config=config, command=command, console=Console(quiet=True))

    def go(folder: Path, first: int, until: int) -> int:
        state = saving.begin(config, run.mesh, folder if first else source, first > 0, tell)
        return dataclasses.replace(run, out=folder, until=until).execute(state, first)

    return verify.verify_resume(config, run.mesh, n, go, tell)


def settle(config: TrainConfig, tokenizer) -> TrainConfig:
    """The config with what the tokenizer and the machine decide: vocabulary and types."""
    from gpt.sampling.language_model import platform_dtype

    dtype = config.dtype or platform_dtype()
    model = dataclasses.replace(config.model, vocab_size=tokenizer.n_vocab)
    return dataclasses.replace(config, model=model.computing_in(dtype), dtype=dtype)


@dataclass
class Run:
    """The loop, and what it works with."""

    out: Path
    console: Any
    command: Command
    config: TrainConfig
    mesh: Any
    tokenizer: tokenizers.Tokenizer
    dataset: shards.Dataset
    signals: stop.StopSignal
    until: int  # the last step to make, for now

    def complete(self) -> int:
        """Say that there is nothing left to do."""
        if not (self.out / "loss.png").exists():
            self.draw()  # a process that was killed at its end did not
        self.console.print(f"complete       {self.config.steps:,} steps; --overwrite starts afresh")
        return 0

    def execute(self, state, first: int) -> int:
        """Train from step `first` to the last, or to a signal; the exit code."""
        from gpt import checkpoint, probe
        from gpt.stopwatch import Stopwatch
        from gpt.training import guard, profile, runlog, step

        out, c = self.out, self.config
        tokenizers.save(self.tokenizer, out / "tokenizer.json")
        if first:
            self.console.print(f"continues      from step {first:,}")
        self.signals.deferred = True  # from here on: compiling must not be broken off
        with Stopwatch() as watch:
            steps = step.compile_steps(c, self.mesh)
        self.console.print(f"compiled       in {watch.compile_seconds:.1f} s")
        peak = probe.matmul_rate(c.model.compute_dtype) * self.mesh.size
        events = board.Board(out / "tensorboard", first) if self.command.tensorboard else None
        tracing = profile.Profile(out / "profile", self.command.profile, first, self.console.print)
        with (
            checkpoint.Writer(out, c.keep, c.keep_best, resumed=first or None) as self.writer,
            runlog.RunLog(out / "metrics.jsonl", first, c, self.console, peak, events) as self.log,
            contextlib.closing(tracing) as self.profile,
        ):
            self.bad = guard.BadSteps(c, first - int(step.count_updates(state.optimizer)))
            self.loop(state, first, *steps)
        self.draw()
        if self.signals.code:
            self.console.print("stopped        the same command continues the run")
        return self.signals.code

    def draw(self) -> None:
        """The picture of the losses."""
        from gpt.training import runlog

        runlog.draw_curves(self.out / "metrics.jsonl", self.out / "loss.png")
        self.console.print(f"loss curve     {self.out / 'loss.png'}")

    def loop(self, state, first: int, train_step, eval_step) -> None:
        """Step by step; each one's metrics are looked at when the device has the next."""
        import jax

        c, last, late = self.config, self.until, None
        with contextlib.closing(data.prefetch(self.batch, first, last)) as batches:
            for done, tokens_ABU in enumerate(batches, first + 1):
                state, metrics = train_step(state, tokens_ABU)
                self.profile.note(done, metrics)
                if late:
                    self.take_note(done - 1, jax.block_until_ready(late), state)
                late, ending = metrics, bool(self.signals.code)
                if ending or self.due(done, c.eval_every, c.sample_every, c.save_every):
                    self.take_note(done, jax.block_until_ready(late), state)
                    late = None
                    with self.log.speed.pause():
                        ending = self.look_up(state, eval_step, done)
                if ending:
                    break

    def take_note(self, done: int, metrics, state) -> None:
        """Log step `done`; Failed if it is one too many in a row whose update was skipped."""
        from gpt.training import guard

        self.log.log_train(done, metrics)
        if self.bad.note(done, int(metrics["skipped"])):
            self.writer.wait()
            raise guard.diverged(self.config, self.bad, self.out, state.params, self.batch)

    def look_up(self, state, eval_step, done: int) -> bool:
        """What is due between two steps: evaluate, show a sample, save. Whether it was the last."""
        c, loss = self.config, None
        saving = self.due(done, c.save_every)
        if self.due(done, c.eval_every) or (saving and c.keep_best):
            loss = self.evaluate(state.average or state.params, eval_step, done)
        if self.due(done, c.sample_every):
            self.show_sample(state.average or state.params)
        ending = done == self.until or bool(self.signals.code)  # it may have come meanwhile
        if ending or saving:
            self.save(state, done, loss, ending)
        return ending

    def due(self, done: int, *intervals: int) -> bool:
        """Whether an interval, in steps, ends with step `done` or with the run; 0 never does."""
        last = done == self.until
        return any(length and (last or done % length == 0) for length in intervals)

    def batch(self, index: int):
        """The batch of step `index` on its devices, [grad_accum, rows, T+1] int32."""
        import jax

        from gpt import sharding

        c = self.config
        tokens = data.batch(self.dataset.train, c.seed, index, c.batch_size, c.window)
        micro = tokens.reshape(c.grad_accum, -1, c.window + 1)
        return jax.device_put(micro, sharding.rows(self.mesh, axis=1))

    def evaluate(self, params, eval_step, done: int) -> float:
        """The loss on held-out text, always the same windows of it, nats a token; it is logged."""
        from gpt.training import step

        loss, bits = step.evaluate(self.config, params, eval_step, self.dataset.val)
        self.log.log_eval(done, loss, bits)
        return loss

    def show_sample(self, params) -> None:
        """Print what the model writes now, from nothing."""
        import jax

        from gpt.model.transformer import unstack
        from gpt.sampling.language_model import LanguageModel

        weights = jax.jit(unstack)(params)
        model = LanguageModel(self.config.model, weights, self.tokenizer, step=0)
        text = str(model.generate(max_new_tokens=SAMPLE_TOKENS))
        self.console.print(f"--- sample ---\n{text}\n---")

    def save(self, state, done: int, loss: float | None, ending: bool) -> None:
        """Write a checkpoint in the background; at the end of the run, until it is on disk."""
        from gpt.training import prepare, saving

        if self.bad.row:  # it may go on like this: these weights must not push out good ones
            self.console.print(f"note: step {done} is not saved: its update was skipped")
            return
        about = prepare.describe_run(self.command.train, self.config, self.tokenizer, self.dataset)
        tell = self.console.print
        saving.save(self.writer, self.config, done, state, about, loss, ending, tell)


if __name__ == "__main__":
    cli.run(main)
