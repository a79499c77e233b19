"""Where a run starts: from random weights, from another run's weights, or where it stopped."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from gpt import checkpoint
from gpt.config import ModelConfig, TrainConfig, from_json, to_json
from gpt.data import tokenizers
from gpt.data.options import DataOptions
from gpt.errors import require
from gpt.training import train_state
from gpt.training.train_state import TrainState, abstract_state, make_state, start_ema
from gpt.wording import counted

if TYPE_CHECKING:
    from gpt.training.run import Run

# These settings change what is printed or kept, or how things are computed, but not what is
# learned. eval_tokens is not one of them: the best checkpoint is chosen by losses on equal tokens.
MAY_CHANGE = {
    "mesh",
    "grad_accum",
    "attention",
    "remat",
    "unroll",
    "deterministic",
    "log_every",
    "eval_every",
    "sample_every",
    "save_every",
    "keep",
    "keep_best",
    "keep_going",
    "max_bad_steps",
}

# Flags outside TrainConfig that a run keeps, so that --resume needs only its folder.
KEPT_FLAGS = ("log_to", "eval_tasks", "eval_tasks_every", "eval_tasks_limit", "eval_tasks_path")


@dataclass(frozen=True)
class StartingPoint:
    """Where the first weights come from.

    `source`: the folder of a run, or None for random weights. `resuming`: whether that is this
    run's own folder. `metadata`: that of the newest good checkpoint in `source`.
    """

    source: Path | None = None
    resuming: bool = False
    metadata: dict[str, Any] | None = None


def find_starting_point(args: Any, out: Path, log: Callable[[str], None]) -> StartingPoint:
    """Where a run with the flags `args` and the folder `out` starts.

    `log` gets a note for each damaged checkpoint that is skipped.
    """
    resuming = bool(checkpoint.saved_steps(out)) and not (args.overwrite or args.verify_resume)
    source = out if resuming else args.init_from
    if source is None:
        return StartingPoint()
    return StartingPoint(source, resuming, newest(source, checkpoint.read_metadata, log))


def with_model_of_source(args: Any, out: Path, flags_given: set[str]):
    """`args` with the model settings of the run that the weights come from, except those given as
    flags.

    Dtypes stay those of the preset: weights that the other run kept in bfloat16 would hardly learn.
    """
    start = find_starting_point(args, out, log=lambda note: None)  # train() logs the same notes
    source = from_json(ModelConfig, start.metadata["model"])
    kept = flags_given | {"model.param_dtype", "model.compute_dtype", "model.cache_dtype"}
    model = with_flags(source, args.config.model, kept, "model.")
    return dataclasses.replace(args, config=dataclasses.replace(args.config, model=model))


def with_flags(config: Any, asked: Any, flags_given: set[str], prefix: str = "") -> Any:
    """`config`, with the fields of `asked` that were given as flags."""
    names = [field.name for field in dataclasses.fields(config)]
    given = {name: getattr(asked, name) for name in names if prefix + name in flags_given}
    return dataclasses.replace(config, **given)


def with_settings_of_run(args: Any, flags_given: set[str]):
    """`args` with the settings and text of the run that --resume names, except those given as
    flags."""
    metadata = newest(args.resume, checkpoint.read_metadata, log=lambda note: None)
    require(
        "source" not in metadata,
        f"{args.resume} was imported and has no training to continue: to start from its "
        f"weights, use --init-from {args.resume} --out ANOTHER",
    )
    saved = from_json(TrainConfig, metadata["train"])
    config = with_flags(saved, args.config, flags_given)
    model = from_json(ModelConfig, metadata["model"])  # unset dtypes stay unset
    config = dataclasses.replace(
        config,
        model=with_flags(model, args.config.model, flags_given, "model."),
        mesh=with_flags(saved.mesh, args.config.mesh, flags_given, "mesh."),
    )
    if args.extend:
        config = dataclasses.replace(
            config,
            steps=saved.steps + args.extend,
            extra_steps=saved.extra_steps + args.extend,
        )
    paths = tuple(Path(path) for path in metadata["data"]["paths"])
    saved_options = DataOptions.from_json(metadata["data"].get("options", {}))
    data_options = with_flags(saved_options, args.data_options, flags_given)
    kept = {name: metadata["flags"][name] for name in KEPT_FLAGS if name not in flags_given}
    if kept.get("eval_tasks_path"):
        kept["eval_tasks_path"] = Path(kept["eval_tasks_path"])
    data = args.data or paths or None
    return dataclasses.replace(args, config=config, data_options=data_options, data=data, **kept)


def require_same_settings(start: StartingPoint, config: TrainConfig) -> None:
    """Raise a UserError that lists how `config` differs from the run to continue, if it does."""
    differing = differences(start.metadata["train"], config, start.metadata["step"])
    listed = "".join(f"\n  {line}" for line in differing)
    more_steps = config.steps - start.metadata["train"]["steps"]
    longer = ""
    if more_steps > 0:
        longer = f"--resume {start.source} --extend {more_steps} for steps after its schedule, "
    require(
        not differing,
        f"{start.source} holds a run that these settings would change:{listed}\n"
        f"Give --resume {start.source} to continue it with its own settings, {longer}another "
        "--out, --overwrite to start afresh, or start from its weights: "
        f"--init-from {start.source} --out ANOTHER",
    )


def differences(saved: dict[str, Any], config: TrainConfig, steps_done: int) -> list[str]:
    """A line for each setting that differs from the saved one but must not after that many steps.

    A setting missing from the saved run counts as its default.
    """
    earlier = from_json(TrainConfig, saved)
    may_change = set(MAY_CHANGE)

    # Steps may follow the end of the schedule.
    if earlier.schedule_steps == config.schedule_steps:
        may_change.add("steps")

    # The number of steps may also change if both schedules are wsd and neither has begun to decay.
    both_wsd = earlier.schedule == config.schedule == "wsd"
    longest_warmup = max(earlier.warmup_steps, config.warmup_steps)
    whole_warmup = longest_warmup < min(earlier.steps, config.steps) - 1
    not_falling = steps_done <= min(earlier.decay_start, config.decay_start)
    if both_wsd and whole_warmup and not_falling:
        may_change.add("steps")

    before, now = settings_by_flag(earlier), settings_by_flag(config)
    lines = []
    for name, value in now.items():
        if value != before[name] and name.split(".")[0] not in may_change:
            lines.append(f"{name}: the run has {before[name]}, you asked for {value}")
    return lines


def settings_by_flag(config: TrainConfig) -> dict[str, Any]:
    """The settings by flag name; "steps" says how many of them --extend has added."""
    settings = flatten_dict(to_json(config), sep=".")
    del settings["extra_steps"]
    return settings | {"steps": describe_steps(config)}


def describe_steps(config: TrainConfig) -> str:
    """The number of steps in words, and how many of them --extend has added."""
    steps = counted(config.steps, "step")
    if config.extra_steps:
        steps += f" (the last {config.extra_steps:,} of them by --extend)"
    return steps


def newest(folder: Path, load: Callable[[Path, int], Any], log: Callable[[str], None]) -> Any:
    """`load(folder, step)` for the newest good checkpoint; `log` gets a note for each bad one."""
    _, loaded, notes = checkpoint.latest_good(folder, partial(load, folder))
    for note in notes:
        log(f"note: {note}; an earlier checkpoint is used")
    return loaded


def initial_state(
    config: TrainConfig, mesh: Mesh, start: StartingPoint, log: Callable[[str], None]
) -> TrainState:
    """The state before the first step: random weights, another run's weights, or the state in which
    this run stopped. Raises UserError if no checkpoint can be used."""
    if start.source is None:
        return make_state(config, mesh)
    like = abstract_state(config, mesh)
    if start.resuming:
        return newest(start.source, partial(train_state.load_state, like), log)

    def load_weights(folder: Path, step: int) -> dict:
        """The other run's averaged weights if it kept an average, otherwise its raw weights."""
        saved = from_json(TrainConfig, checkpoint.read_metadata(folder, step)["train"])
        tree = "ema_params" if saved.ema_decay else "params"
        return checkpoint.restore(folder, step, tree, like.params)

    params = newest(start.source, load_weights, log)
    state = make_state(config, mesh)
    return dataclasses.replace(state, params=params, ema_params=start_ema(config, params))


def checkpoint_metadata(run: "Run") -> dict[str, Any]:
    """The metadata that makes a checkpoint of `run` self-contained, as JSON.

    Unset dtypes stay unset, so that another machine can use its own defaults. Paths stay as they
    were typed, so that the command can be repeated.
    """
    args, config = run.args, run.config
    model = dataclasses.replace(
        args.config.model,
        vocab_size=config.model.vocab_size,
        context_length=config.model.context_length,
    )
    init_from = None if args.init_from is None else str(args.init_from)
    if run.start.resuming:
        init_from = run.start.metadata["init_from"]  # as at the start of the run
    flags = {name: getattr(args, name) for name in KEPT_FLAGS}
    if args.eval_tasks_path:
        flags["eval_tasks_path"] = str(args.eval_tasks_path)
    return {
        "model": to_json(model),
        "train": to_json(config),
        "tokenizer": tokenizers.to_json(run.tokenizer),
        "data": {
            "fingerprint": run.dataset.fingerprint,
            "files": run.dataset.files,
            "paths": [str(path) for path in args.data or ()],
            "options": args.data_options.to_json(),
        },
        "init_from": init_from,
        "flags": flags,
    }
