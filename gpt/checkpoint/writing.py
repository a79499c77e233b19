"""Writing checkpoints in the background, and which of them are kept. Reads no array."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gpt import distributed
from gpt.checkpoint.folder import PLACE, Damaged, Unsaved, half_written, reason_of, steps
from gpt.checkpoint.record import read_record, seal
from gpt.digest import digest, named_leaves

Tree = Any  # a pytree of jax arrays, or of ShapeDtypeStructs
policies = ocp.training.preservation_policies


@dataclasses.dataclass
class BestLoss:
    """orbax's BestN by the losses in `losses`, {step: loss}; a step without one is not best.

    Left to itself orbax keeps such numbers in a file without a digest, and trips over its damage.
    """

    losses: dict[int, float]
    n: int

    def should_preserve(self, checkpoints: Sequence, *, context) -> Sequence[bool]:
        """Which of orbax's `checkpoints` to keep."""
        graded = [Graded(c.step, self.losses.get(c.step)) for c in checkpoints]
        best = policies.BestN(
            get_metric_fn=lambda loss: -loss, n=self.n, keep_checkpoints_without_metrics=False
        )
        return best.should_preserve(graded, context=context)


@dataclasses.dataclass
class Graded:
    """What orbax's BestN looks at."""

    step: int
    metrics: float | None


class Writer:
    """Writes a run's checkpoints in the background; keeps the latest and the best. Close it.

    `keep` and `best`: how many of the latest, and of those of lowest loss, are kept.
    `resumed` is the step this run was restored from; steps past it belong to a line of training
    that was given up (they were damaged), and the next save removes them.
    """

    def __init__(self, folder: str | Path, keep: int, best: int = 0, *, resumed: int | None = None):
        found = steps(folder)
        self.folder = folder
        self.latest = resumed if resumed is not None else max(found, default=None)
        self.stale = [s for s in found if self.latest is not None and s > self.latest]
        self.losses = losses_of(folder, found) if best else {}
        self.pending, self.failed = None, False
        latest, lowest = policies.LatestN(keep), BestLoss(self.losses, best)
        self.orbax = ocp.training.Checkpointer(
            Path(folder).absolute() / PLACE,
            preservation_policy=policies.AnyPreservationPolicy([latest, lowest]),
            cleanup_tmp_directories=True,
        )

    def save(
        self,
        step: int,
        trees: Mapping[str, Tree],
        metadata: dict[str, Any],
        *,
        loss: float | None = None,
        wait: bool = False,
    ) -> None:
        """Save named `trees` and JSON `metadata` as `step`; nothing to do if it is the latest.

        `loss` is what the best are chosen by. The arrays may be donated as soon as this returns.
        A save that fails in the background is raised as Unsaved by the next save, `wait` or
        `close`.
        """
        if step != self.latest:
            self.wait()
            self.clear_again()
            for stale in self.stale:
                self.orbax.delete(stale)
            named = {name: named_leaves(tree) for name, tree in trees.items()}
            if loss is not None and math.isfinite(loss):
                self.losses[step] = loss
            record = {"step": step, "loss": self.losses.get(step), "metadata": metadata}
            record |= {"arrays": {name: describe(tree) for name, tree in named.items()}}
            self.latest, self.stale = step, []
            with self.telling():
                self.pending = self.orbax.save_checkpointables_async(
                    step,
                    {name: stored for name in named if (stored := storable(named[name]))},
                    force=True,  # the caller decides when
                    custom_metadata=seal(record),
                )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the save in the background is on disk; raise Unsaved if it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            with self.telling():
                pending.result()

    def clear_again(self) -> None:
        """After a save that failed: remove what a slow thread of orbax's has left of it since."""
        if self.failed and distributed.is_first():
            clear(self.folder)
        self.failed = False

    @contextlib.contextmanager
    def telling(self):
        """Raise what fails inside as Unsaved, when all that was half written is gone again."""
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore's failures are ValueErrors
            self.failed = True
            with contextlib.suppress(OSError, ValueError):
                self.orbax.wait()  # the same error once more, or the next save would raise it
            if distributed.is_first():
                clear(self.folder)  # it takes the room that is wanted
            self.orbax.reload()
            step, self.latest = self.latest, max(steps(self.folder), default=None)
            kept = (
                f"the last good one is step {self.latest}" if self.latest else "there is no other"
            )
            raise Unsaved(
                f"the checkpoint of step {step} could not be saved in {self.folder}; {kept}: "
                f"{reason_of(error)}"
            ) from None

    def close(self) -> None:
        """Wait for the save in the background, and let go of the folder."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(OSError, ValueError):  # told by `wait`, in more words
                self.orbax.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def clear(folder: str | Path) -> None:
    """Remove what a failed save has left, until nothing new comes: orbax gives up at the first
    error, while others of its threads go on writing."""
    quiet = 0
    for _ in range(50):
        found = half_written(folder)
        for half in found:
            shutil.rmtree(half, ignore_errors=True)
        quiet = 0 if found else quiet + 1
        if quiet == 3:
            return
        time.sleep(0.05)


def losses_of(folder: str | Path, found: list[int]) -> dict[int, float]:
    """The losses that the steps in `found` were saved with, as far as they can be read."""
    losses = {}
    for step in found:
        with contextlib.suppress(Damaged):
            losses[step] = read_record(folder, step).get("loss")
    return {step: loss for step, loss in losses.items() if isinstance(loss, float)}


def storable(named: dict[str, Any]) -> dict[str, Any]:
    """The arrays that hold something: orbax refuses those of no elements."""
    return {name: x for name, x in named.items() if math.prod(x.shape)}


def describe(named: dict[str, jax.Array]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and digest of each array: what reading it back is checked against."""
    digests = digest(named)
    return {
        name: {"shape": list(x.shape), "dtype": x.dtype.name, "digest": digests[name]}
        for name, x in named.items()
    }
