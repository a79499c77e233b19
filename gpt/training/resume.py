"""A run's folder met again: what may change when it continues, what goes when it starts afresh."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from gpt import checkpoint
from gpt.config import ModelConfig, TrainConfig, from_json, to_json
from gpt.errors import UserError, require

# These change what is printed, kept or where it is computed, never what is learned.
MAY_CHANGE = {
    "mesh", "grad_accum", "remat", "log_every", "eval_every", "eval_tokens", "sample_every",
    "save_every", "keep", "keep_best", "keep_going", "max_bad_steps",
    "seq_len",  # which model.context_length repeats
}  # fmt: skip
Loaded = TypeVar("Loaded")
FILES = ("metrics.jsonl", "samples.jsonl", "tokenizer.json", "loss.png")
FILES += ("metrics.jsonl.new", "samples.jsonl.new", "loss.new")  # of a process that was killed
EVENTS, TRACES = "tensorboard/events.out.tfevents.*", "profile/plugins/profile/[0-9]*"
FOLDERS = ("tensorboard", "profile", "profile/plugins", "profile/plugins/profile")


def differences(saved: dict[str, Any], config: TrainConfig, done: int) -> list[str]:
    """A line for each setting that differs from the saved ones and may not after `done` steps."""
    earlier = from_json(TrainConfig, saved)  # a younger field by default
    lines, before = [], flat(to_json(earlier))
    free = MAY_CHANGE | ({"steps"} if same_until(earlier, config, done) else set())
    for name, now in flat(to_json(config)).items():
        then = before[name]
        if then != now and name.split(".")[0] not in free:
            lines.append(f"{name}: the run has {then}, you asked for {now}")
    return lines


def same_until(earlier: TrainConfig, later: TrainConfig, done: int) -> bool:
    """Whether both prescribe the same learning rates for the `done` steps: wsd, not yet falling."""
    wsd = earlier.schedule == later.schedule == "wsd"
    rising = min(earlier.steps, later.steps) > max(earlier.warmup_steps, later.warmup_steps)
    return wsd and rising and done <= min(earlier.decay_start, later.decay_start)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, as the flags spell them; lists as tuples."""
    out = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = tuple(value) if isinstance(value, list) else value
    return out


def require_same_text(about: dict[str, Any], fingerprint: str) -> None:
    """UserError unless a run that continues was trained on this very text."""
    require(
        isinstance(about["data"], dict) and about["data"].get("fingerprint") == fingerprint,
        "data: the run was trained on other text, or the text has changed; give the same "
        "--data to continue it, another --out, or --overwrite to start afresh",
    )


def require_same_run(folder, about: dict[str, Any], config: TrainConfig) -> None:
    """UserError listing what differs between the run in `folder` and what was asked for."""
    done = about["step"]
    require(type(done) is int, f"{folder}: its checkpoint says that step {done!r} is done")
    lines = differences(about["train"], config, done)
    listed = "".join(f"\n  {line}" for line in lines)
    require(
        not lines,
        f"{folder} holds a run that these settings would change:{listed}\n"
        "Give the run's own settings to continue it, another --out, --overwrite to start afresh, "
        f"or train on from its weights: --init-from {folder} --out ANOTHER",
    )


def newest(
    folder: Path, load: Callable[[Path, int], Loaded], tell: Callable[[str], None]
) -> Loaded:
    """What `load` makes of a run's newest whole checkpoint; `tell` hears of each damaged one."""
    _, loaded, damaged = checkpoint.latest_good(folder, partial(load, folder))
    for note in damaged:
        tell(f"note: {note}; an earlier checkpoint is used")
    return loaded


def adopt(default, command, out: Path):
    """`default`, a command, with the model of the run in --init-from, or of that which continues.

    So what no flag says of the model is as it was when its weights were made. The types of weights
    and products stay the preset's: weights kept in bfloat16 would hardly learn.
    """
    resuming = checkpoint.steps(out) and not (command.overwrite or command.verify_resume)
    source = out if resuming else command.init_from
    about = newest(source, checkpoint.read_metadata, lambda note: None)  # it is told later
    own = default.train.model
    types = {n: getattr(own, n) for n in ("param_dtype", "compute_dtype", "cache_dtype")}
    model = dataclasses.replace(from_json(ModelConfig, about["model"]), **types)
    return dataclasses.replace(default, train=dataclasses.replace(default.train, model=model))


def load_weights(like, folder: Path, step: int, tree: str = "params") -> dict[str, Any]:
    """The weights of a training state, placed as `like` says."""
    return {"params": checkpoint.restore(folder, step, tree, like.params)}


def load_start(like, folder: Path, step: int) -> dict[str, Any]:
    """What a new run starts from: the average of the earlier one's weights where it kept one."""
    kept = from_json(TrainConfig, checkpoint.read_metadata(folder, step)["train"]).ema_decay
    start = load_weights(like, folder, step, "average" if kept else "params")
    return start | ({"average": jax.tree.map(jnp.copy, start["params"])} if like.average else {})


def load_state(like, folder: Path, step: int) -> dict[str, Any]:
    """All fields of a training state, placed as those of `like`."""
    rest = {"optimizer": like.optimizer, "step": like.step}
    rest = checkpoint.restore(folder, step, "rest", rest)
    if int(rest["step"]) != step:
        raise checkpoint.Damaged(f"{folder}: checkpoint {step} holds step {rest['step']}")
    if like.average:
        rest["average"] = checkpoint.restore(folder, step, "average", like.average)
    return load_weights(like, folder, step) | rest


@contextlib.contextmanager
def forgiving(forgive: bool, tell: Callable[[str], None]) -> Iterator[None]:
    """If a checkpoint cannot be written inside, `tell` of it; or UserError, with what to do."""
    try:
        yield
    except checkpoint.Unsaved as error:
        if not forgive:
            advice = "make room and give the same command again, or go on unsaved: --keep-going"
            raise UserError(f"{error}; {advice}") from None
        tell(f"note: {error}; training goes on")


def remove_run(out: Path) -> None:
    """Remove what a run wrote in its folder, and nothing else."""
    for step in checkpoint.steps(out):
        place = checkpoint.place_of(out, step)
        place.unlink() if place.is_symlink() else shutil.rmtree(place)
    for path in [*(out / name for name in FILES), *out.glob(EVENTS)]:
        path.unlink(missing_ok=True)
    for path in out.glob(TRACES):
        shutil.rmtree(path)
    for name in reversed(FOLDERS):
        with contextlib.suppress(OSError):  # not there, or another's files are in it
            (out / name).rmdir()
