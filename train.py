"""Pretrain a GPT: python train.py [PRESET] [flags]. Reads from top to bottom.

    python train.py                                    tiny, on Python's standard library
    python train.py shakespeare-char --data my.txt     another preset, your own text

The same command again continues the run where it stopped.
"""

import contextlib
import dataclasses
import math
import shlex
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt import cli
from gpt import tokenizer as tokenizers
from gpt.config import TrainConfig, to_json
from gpt.errors import require
from gpt.presets import PRESETS
from gpt.training import corpus, data, shards

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
    cli.prepare_jax(cache=command.compile_cache and not command.dry_run)
    return train(command, command.out or Path("runs") / command.preset)


def train(command: Command, out: Path) -> int:
    """Look at all that can be refused; then change what is on disk, and run."""
    from rich.console import Console

    from gpt import checkpoint, sharding
    from gpt.training import plan, resume, step

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    resume.require_folder(out)
    resuming = bool(checkpoint.steps(out)) and not command.overwrite
    source = out if resuming else command.init_from
    about = resume.newest(source, checkpoint.read_metadata, console.print) if source else None

    if about and not resuming:
        about = {"tokenizer": about["tokenizer"]}  # all that a new run takes beside the weights
    tokenizer, dataset = prepare_data(command, about, console)
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
    loaded = resume.newest(source, load, console.print) if source else {}
    state = like if resuming else step.make_state(config, mesh)
    state = dataclasses.replace(state, **loaded)
    if command.overwrite:
        resume.remove_run(out)
    run = Run(out, console, command.train, config, mesh, tokenizer, dataset)
    first = int(state.step)
    code = run.execute(state, first) if first < config.steps else run.complete()
    console.print(f"sample it      python sample.py {shlex.quote(str(out))} --prompt TEXT")
    return code


def prepare_data(command: Command, about: dict[str, Any] | None, console):
    """The tokenizer, that of an earlier run if there is one, and the text as tokens."""
    from gpt.training import resume, runlog

    prepared = any(shards.is_prepared(path) for path in command.data)
    require(
        not prepared or len(command.data) == 1,
        "--data holds prepared tokens beside other paths: they stand alone, since text cannot be "
        "added to them",
    )
    text = None
    if not prepared:
        text = corpus.read_corpus(command.data) if command.data else corpus.standard_library()
        console.print(
            f"text           {text.description}, {text.n_documents:,} document(s), "
            f"fingerprint {text.fingerprint[:12]}"
            + ("" if command.data else "; for your own: --data PATH")
        )
        if text.skipped:
            names = ", ".join(text.skipped[:5]) + (", ..." if len(text.skipped) > 5 else "")
            console.print(f"skipped        {len(text.skipped):,} file(s), not text: {names}")
    config = command.train
    if about:
        tokenizer = tokenizers.from_json(about["tokenizer"])
    elif prepared and (command.data[0] / "tokenizer.json").exists():
        tokenizer = tokenizers.load(command.data[0] / "tokenizer.json")
    else:
        require(
            not prepared or config.tokenizer != "bpe",
            "--data has no tokenizer beside its tokens, and none can be trained on them: name the "
            "one that made them with --tokenizer",
        )
        documents = text.documents if text else lambda: ()
        tokenizer = tokenizers.create(config.tokenizer, documents, config.vocab_size)
    if prepared:
        return tokenizer, shards.open_prepared(command.data[0], tokenizer)
    if about and "data" in about:  # here, before a tokenizer meets what it was not made for
        resume.require_same_text(about, shards.fingerprint_of(text, tokenizer))
    with token_folder(command.dry_run) as folder, runlog.tokenizing(console) as report:
        return tokenizer, shards.tokenize(text, tokenizer, Path(folder), report)


def token_folder(dry_run: bool):
    """Where token shards are kept for the next run; a dry run leaves nothing behind."""
    if dry_run:
        return tempfile.TemporaryDirectory()
    return contextlib.nullcontext(cli.cache_folder() / "tokens")


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

    def complete(self) -> int:
        """Say that there is nothing left to do."""
        self.console.print(f"complete       {self.config.steps:,} steps; --overwrite starts afresh")
        return 0

    def execute(self, state, first: int) -> int:
        """Train from step `first` to the last, or to a signal; the exit code."""
        from gpt import checkpoint
        from gpt.stopwatch import Stopwatch
        from gpt.training import runlog, step, stop

        out, c = self.out, self.config
        out.mkdir(parents=True, exist_ok=True)
        tokenizers.save(self.tokenizer, out / "tokenizer.json")
        if first:
            self.console.print(f"continues      from step {first:,}")
        with stop.StopSignal() as self.signals:  # first of all: compiling must not be broken off
            with Stopwatch() as watch:
                steps = step.compile_steps(c, self.mesh)
            self.console.print(f"compiled       in {watch.compile_seconds:.1f} s")
            with (
                checkpoint.Writer(out, c.keep, resumed=first or None) as self.writer,
                runlog.RunLog(out / "metrics.jsonl", first, c, self.console) as self.log,
            ):
                self.loop(state, first, *steps)
        runlog.draw_curves(out / "metrics.jsonl", out / "loss.png")
        self.console.print(f"loss curve     {out / 'loss.png'}")
        if self.signals.code:
            self.console.print("stopped        the same command continues the run")
        return self.signals.code

    def loop(self, state, first: int, train_step, eval_step) -> None:
        """Step by step; each one's metrics are looked at when the device has the next."""
        import jax

        c, last, late = self.config, self.config.steps, None
        with contextlib.closing(data.prefetch(self.batch, first, last)) as batches:
            for done, tokens_ABU in enumerate(batches, first + 1):
                state, metrics = train_step(state, tokens_ABU)
                if late:
                    self.log.log_train(done - 1, jax.block_until_ready(late))
                late, ending = metrics, done == last or bool(self.signals.code)
                if ending or self.due(done, c.eval_every, c.sample_every, c.save_every):
                    self.log.log_train(done, jax.block_until_ready(late))
                    late = None
                    with self.log.pause():
                        self.look_up(state, eval_step, done, ending)
                if ending:
                    break

    def look_up(self, state, eval_step, done: int, ending: bool) -> None:
        """What is due between two steps: evaluate, show a sample, save."""
        c = self.config
        if self.due(done, c.eval_every):
            self.evaluate(state.average or state.params, eval_step, done)
        if self.due(done, c.sample_every):
            self.show_sample(state.average or state.params)
        if ending or self.due(done, c.save_every):
            self.save(state, done, wait=ending)

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

    def evaluate(self, params, eval_step, done: int) -> None:
        """Log the loss on held-out text, always the same windows of it."""
        c, val = self.config, self.dataset.val
        rows = c.batch_size // c.grad_accum
        windows = data.evaluation_windows(val, c.window, c.eval_tokens, rows)
        sums = [eval_step(params, tokens, weights) for tokens, weights in windows]
        loss = float(sum(total for total, _ in sums) / sum(n for _, n in sums))
        self.log.log_eval(done, loss, loss / math.log(2) * len(val) / val.n_bytes)

    def show_sample(self, params) -> None:
        """Print what the model writes now, from nothing."""
        import jax

        from gpt.model.transformer import unstack
        from gpt.sampling.language_model import LanguageModel

        weights = jax.jit(unstack)(params)
        model = LanguageModel(self.config.model, weights, self.tokenizer, step=0)
        text = str(model.generate(max_new_tokens=SAMPLE_TOKENS))
        self.console.print(f"--- sample ---\n{text}\n---")

    def save(self, state, done: int, wait: bool) -> None:
        """Write a checkpoint in the background, or `wait` until it is on disk."""
        trees = {
            "params": state.params,
            "rest": {"optimizer": state.optimizer, "step": state.step},
        }
        if state.average:
            trees["average"] = state.average
        about = describe_run(self.asked, self.config, self.tokenizer, self.dataset) | {"step": done}
        self.writer.save(done, trees, about, wait=wait)


if __name__ == "__main__":
    cli.run(main)
