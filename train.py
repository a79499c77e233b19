"""Pretrain a GPT: python train.py [PRESET] [flags]. Reads from top to bottom.

    python train.py                                    tiny, on Python's standard library
    python train.py shakespeare-char --data my.txt     another preset, your own text

The same command again continues the run where it stopped.
"""

import contextlib
import dataclasses
import math
import shlex
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt import cli
from gpt import tokenizer as tokenizers
from gpt.config import TrainConfig, to_json
from gpt.presets import PRESETS
from gpt.training import data, lock, shards, stop

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
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = PRESETS["tiny"]


def main(argv: list[str]) -> int:
    """Read the flags, prepare JAX, train; the exit code."""
    preset = cli.peek(Command, argv, "preset", default=Command())
    default = Command(preset=preset, train=PRESETS.get(preset, PRESETS["tiny"]))
    command = cli.parse(Command, argv, program="train.py", description=__doc__, default=default)
    out = command.out or Path("runs") / command.preset
    cli.prepare_jax(cache=not command.dry_run)
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if command.dry_run:
        lock.require_folder(out)
        return train(command, out, console)
    with stop.StopSignal(console.print, console.show_cursor) as signals, lock.hold(out):
        return train(command, out, console, signals)


def train(command: Command, out: Path, console, signals: stop.StopSignal | None = None) -> int:
    """Look at all that can be refused; then change what is on disk, and run."""
    from gpt import checkpoint, sharding
    from gpt.training import plan, prepare, resume, step

    resuming = bool(checkpoint.steps(out)) and not command.overwrite
    source = out if resuming else command.init_from
    tell = cache(console.print)  # of each damaged checkpoint once
    about = resume.newest(source, checkpoint.read_metadata, tell) if source else None

    if about and not resuming:
        about = {"tokenizer": about["tokenizer"]}  # all that a new run takes beside the weights
    kept = None if command.dry_run else cli.cache_folder() / "tokens"  # it leaves nothing behind
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
        return 0

    like = step.abstract_state(config, mesh)
    load = partial(resume.load_state if resuming else resume.load_start, like)
    loaded = resume.newest(source, load, tell) if source else {}
    state = like if resuming else step.make_state(config, mesh)
    state = dataclasses.replace(state, **loaded)
    if command.overwrite:
        resume.remove_run(out)
    run = Run(out, console, command.train, config, mesh, tokenizer, dataset, signals)
    first = int(state.step)
    code = run.execute(state, first) if first < config.steps else run.complete()
    console.print(f"sample it      python sample.py {shlex.quote(str(out))} --prompt TEXT")
    return code


def settle(config: TrainConfig, tokenizer) -> TrainConfig:
    """The config with what the tokenizer and the machine decide: vocabulary and types."""
    from gpt.sampling.language_model import platform_dtype

    dtype = config.dtype or platform_dtype()
    model = dataclasses.replace(config.model, vocab_size=tokenizer.n_vocab)
    return dataclasses.replace(config, model=model.computing_in(dtype), dtype=dtype)


def describe_run(asked: TrainConfig, config: TrainConfig, tokenizer, dataset) -> dict[str, Any]:
    """All that a checkpoint says beside its arrays: it needs nothing else to be used.

    Types that were left open in what was `asked` stay open: another machine fills them its way.
    """
    model = dataclasses.replace(asked.model, vocab_size=config.model.vocab_size)
    return {
        "model": to_json(model),
        "train": to_json(config),
        "tokenizer": tokenizers.to_json(tokenizer),
        "data": {"fingerprint": dataset.fingerprint},
    }


@dataclass
class Run:
    """The loop, and what it works with."""

    out: Path
    console: Any
    asked: TrainConfig
    config: TrainConfig
    mesh: Any
    tokenizer: tokenizers.Tokenizer
    dataset: shards.Dataset
    signals: stop.StopSignal

    def complete(self) -> int:
        """Say that there is nothing left to do."""
        if not (self.out / "loss.png").exists():
            self.draw()  # a process that was killed at its end did not
        self.console.print(f"complete       {self.config.steps:,} steps; --overwrite starts afresh")
        return 0

    def execute(self, state, first: int) -> int:
        """Train from step `first` to the last, or to a signal; the exit code."""
        from gpt import checkpoint
        from gpt.stopwatch import Stopwatch
        from gpt.training import runlog, step

        out, c = self.out, self.config
        tokenizers.save(self.tokenizer, out / "tokenizer.json")
        if first:
            self.console.print(f"continues      from step {first:,}")
        self.signals.deferred = True  # from here on: compiling must not be broken off
        with Stopwatch() as watch:
            steps = step.compile_steps(c, self.mesh)
        self.console.print(f"compiled       in {watch.compile_seconds:.1f} s")
        with (
            checkpoint.Writer(out, c.keep, c.keep_best, resumed=first or None) as self.writer,
            runlog.RunLog(out / "metrics.jsonl", first, c, self.console) as self.log,
        ):
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

        c, last, late = self.config, self.config.steps, None
        with contextlib.closing(data.prefetch(self.batch, first, last)) as batches:
            for done, tokens_ABU in enumerate(batches, first + 1):
                state, metrics = train_step(state, tokens_ABU)
                if late:
                    self.log.log_train(done - 1, jax.block_until_ready(late))
                late, ending = metrics, bool(self.signals.code)
                if ending or self.due(done, c.eval_every, c.sample_every, c.save_every):
                    self.log.log_train(done, jax.block_until_ready(late))
                    late = None
                    with self.log.pause():
                        ending = self.look_up(state, eval_step, done)
                if ending:
                    break

    def look_up(self, state, eval_step, done: int) -> bool:
        """What is due between two steps: evaluate, show a sample, save. Whether it was the last."""
        c, loss = self.config, None
        saving = self.due(done, c.save_every)
        if self.due(done, c.eval_every) or (saving and c.keep_best):
            loss = self.evaluate(state.average or state.params, eval_step, done)
        if self.due(done, c.sample_every):
            self.show_sample(state.average or state.params)
        ending = done == c.steps or bool(self.signals.code)  # it may have come meanwhile
        if ending or saving:
            self.save(state, done, loss, ending)
        return ending

    def due(self, done: int, *intervals: int) -> bool:
        """Whether an interval, in steps, ends with step `done` or with the run; 0 never does."""
        last = done == self.config.steps
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
        c, val = self.config, self.dataset.val
        rows = c.batch_size // c.grad_accum
        windows = data.evaluation_windows(val, c.window, c.eval_tokens, rows)
        sums = [eval_step(params, tokens, weights) for tokens, weights in windows]
        loss = float(sum(total for total, _ in sums) / sum(n for _, n in sums))
        self.log.log_eval(done, loss, loss / math.log(2) * len(val) / val.n_bytes)
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
        from gpt.training.resume import forgiving

        trees = {
            "params": state.params,
            "rest": {"optimizer": state.optimizer, "step": state.step},
        }
        if state.average:
            trees["average"] = state.average
        about = describe_run(self.asked, self.config, self.tokenizer, self.dataset) | {"step": done}
        going_on = self.config.keep_going
        with forgiving(going_on or ending, self.console.print):  # an earlier one, that failed
            self.writer.wait()
        with forgiving(going_on and not ending, self.console.print):
            self.writer.save(done, trees, about, loss=loss, wait=ending)


if __name__ == "__main__":
    cli.run(main)
