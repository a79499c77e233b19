"""Pretrain a GPT: python train.py [PRESET] [flags].

    python train.py                                    tiny, on the source of Python's library
    python train.py shakespeare-char --data my.txt     another preset, your own text

To continue a run where it stopped, repeat the command or use --resume FOLDER.
"""

import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gpt import cli, train_flags
from gpt.train_flags import Args

if TYPE_CHECKING:
    from rich.console import Console

    from gpt.training.run import Run
    from gpt.training.stop_signal import StopSignal
    from gpt.training.train_state import TrainState

# JAX is imported inside the functions below, after the flags are parsed, to keep `--help` fast.


def train(args: Args, out: Path, console: "Console", stop: "StopSignal") -> int:
    """From text to a trained model in `out`; returns the exit code."""
    from gpt import distributed, hardware, sharding
    from gpt.training import auto_settings, resume, run_plan
    from gpt.training.run import Run, load_text

    dtype = hardware.default_dtype()  # first, so that a missing device fails before text is read
    note_once = cache(console.print)
    with distributed.fail_together():  # if one process fails here, all of them do
        # Where the weights come from: random, another run, or where this run stopped.
        start = resume.find_starting_point(args, out, note_once)

        # Text to tokens. A run that continues keeps its tokenizer, and its text must be the same.
        tokenizer, dataset = load_text(args, start, cli.cache_folder() / "tokens", console)

        # The devices, the settings that `auto` chooses for them, and whether the run is possible.
        mesh = sharding.make_mesh(args.config.mesh)
        config = auto_settings.complete_config(args, start, tokenizer.n_vocab, dtype, mesh)
        run = Run(args, out, start, config, mesh, tokenizer, dataset, console, stop)
        run.require_possible()
        console.print(*run_plan.describe(config, mesh, dataset, run.minutes), sep="\n")

    run.require_same_everywhere()
    if args.dry_run:
        run_plan.print_memory(config, mesh, args.memory_bytes, console.print)
        console.print(f"dry run        nothing is written; the run would be in {out}")
        return 0
    if args.verify_resume:
        from gpt.training import verify

        return verify.verify_resume(run, fit, note_once)

    # With --minutes, time a few throwaway steps to choose the number of steps.
    if run.minutes:
        auto_settings.choose_steps_by_measuring(run)
    # Weights and optimizer state, on the mesh.
    state = resume.initial_state(run.config, mesh, start, note_once)
    if state.step < run.config.steps:
        fit(run, state, run.config.steps)
    else:
        steps = resume.describe_steps(run.config)
        console.print(f"complete       {steps}; to train longer: --resume {out} --extend STEPS")
    code = run.finish()
    if code:
        console.print(
            f"stopped        to continue: {cli.command('train.py', '--resume', str(out))}"
        )
    console.print(f"sample it      {cli.command('sample.py', str(out), '--prompt', 'TEXT')}")
    return code


def fit(run: "Run", state: "TrainState", until: int) -> None:
    """Train from `state` until step `until` is saved, or until a signal."""
    from gpt.evaluate import in_training
    from gpt.training import auto_settings, data_loader, evaluation
    from gpt.training.recorder import Recorder, is_due

    tasks = in_training.load_tasks(run)  # None without --eval-tasks

    # Compile the functions of gpt/training/step_functions.py for the mesh. If a step needs more
    # memory than expected, `auto` picks more frugal settings and `run.config` changes.
    train_step, eval_step = auto_settings.compile_with_fallback(run)
    config = run.config
    steps_done = int(state.step)
    # From here on a signal waits for the end of a step. Until here the run's folder is untouched.
    run.stop.defer(steps_done)
    run.take_over_folder(steps_done)

    batches = data_loader.load_batches(config, run.mesh, run.dataset.train, steps_done, until)
    with Recorder(run, state) as recorder:
        recorder.try_save(state)
        for step, batch in batches:
            state, metrics = train_step(state, batch)
            # Reads the previous step's numbers while the device computes this one.
            recorder.note_step(step, state, metrics)

            ending = step == until or run.stop.must_end_after(step)
            evaluates = is_due(config, step, config.eval_every)
            saves = is_due(config, step, config.save_every)
            samples = is_due(config, step, config.sample_every)
            evaluates_tasks = tasks is not None and is_due(config, step, run.args.eval_tasks_every)
            if not (ending or evaluates or saves or samples or evaluates_tasks):
                continue
            # A step whose update was skipped is never saved, so training cannot end on it.
            updated = recorder.wait_for_update(state)
            ending = ending and updated
            weights = state.ema_params or state.params

            val_loss = None
            if evaluates or (saves and config.keep_best):
                val_loss, bits_per_byte = evaluation.evaluate(
                    config, weights, eval_step, run.dataset.val
                )
                recorder.log.evaluation(step, val_loss, bits_per_byte)
            if ending or saves:
                recorder.save(step, state, val_loss, wait=ending)
            if evaluates_tasks:
                with recorder.attempt("evaluation on tasks", step):
                    recorder.log.tasks(step, in_training.evaluate_tasks(run, tasks, weights))
            if samples:
                with recorder.attempt("sample", step):
                    recorder.log.sample(step, in_training.write_sample(run, weights))
            if ending:
                break
            recorder.log.timer.skip_until_now()


def main(argv: list[str]) -> int:
    """Parse the flags, prepare JAX and train; returns the exit code."""
    args = train_flags.parse_args(argv, __doc__)
    if args.plans_absent:
        cli.prepare_absent()
        from gpt.plan.absent import print_plan

        return print_plan(args)

    out = args.resume or args.out or Path("runs") / args.preset
    cli.prepare_jax(cache=args.compile_cache and not args.is_trial)
    from gpt import distributed

    # Before anything asks for a device.
    distributed.connect(args.processes, os.environ, lambda note: print(note, file=sys.stderr))
    from gpt.training import memory_plan, metrics, resume, run_dir, stop_signal

    if args.resume:
        args = resume.with_settings_of_run(args, cli.flags_given(argv))
    if args.init_from:
        args = resume.with_model_of_source(args, out, cli.flags_given(argv))
    if args.config.deterministic:
        cli.make_deterministic()
    console = metrics.make_console(quiet=not distributed.is_first())
    with (
        stop_signal.StopSignal(console.print, console.show_cursor) as stop,
        distributed.report_lost_peer(),
        run_dir.reserve(out, args.is_trial),
        memory_plan.explain_out_of_memory(args.config),
    ):
        return train(args, out, console, stop)


if __name__ == "__main__":
    cli.run(main)
