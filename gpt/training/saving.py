"""A training state on its way to a checkpoint and back. Decides neither when nor where."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gpt import checkpoint
from gpt.config import TrainConfig
from gpt.training import resume, train_step
from gpt.training.train_step import TrainState


def begin(
    config: TrainConfig,
    mesh: Mesh,
    source: Path | None,
    resuming: bool,
    tell: Callable[[str], None],
) -> TrainState:
    """The state of the first step: that of the run in `source`, or a fresh one with its weights.

    `tell` hears of each checkpoint that is passed over. UserError if there is none to be used.
    """
    like = train_step.abstract_state(config, mesh)
    load = partial(resume.load_state if resuming else resume.load_start, like)
    loaded = resume.newest(source, load, tell) if source else {}
    state = like if resuming else train_step.make_state(config, mesh)
    return dataclasses.replace(state, **loaded)


def save(
    writer: checkpoint.Writer,
    config: TrainConfig,
    done: int,
    state: TrainState,
    about: dict[str, Any],
    loss: float | None,
    ending: bool,
    tell: Callable[[str], None],
) -> None:
    """Write the state after `done` steps in the background; if `ending`, until it is on disk.

    `about`: what else the checkpoint says. `loss`: on held-out text, nats a token. UserError where
    it cannot be written; with config.keep_going `tell` hears of it instead.
    """
    about = about | {"step": done}
    with resume.forgiving(True, tell):  # an earlier one, that failed: this one may find room
        writer.wait()
    with resume.forgiving(config.keep_going and not ending, tell):
        writer.save(done, train_step.stored(state), about, loss=loss, wait=ending or writer.failed)
