"""Checkpoints: named trees of arrays and some JSON, each with a digest; orbax does the writing.

A run's folder holds `checkpoints/STEP`. Writing is asynchronous and atomic. Reading verifies: a
flipped bit in a file is otherwise loaded without a word. Arrays are stored under plain names
(`blocks/q`), so that what is stored depends on no Python class and no mesh.
Knows neither model nor optimizer.
"""

import contextlib
import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gpt.digest import digest, named_leaves
from gpt.errors import UserError, require

T = TypeVar("T")
Tree = Any  # a pytree of jax arrays, or of ShapeDtypeStructs
PLACE = "checkpoints"


def hush_orbax() -> None:
    """Keep orbax's own reports from the terminal: every failure it meets is raised as well.

    It logs through absl. And beside a read that fails it abandons others, for each of which
    Python prints a traceback: later, from other threads, when its event loop is closed.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.msg)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report, abandoned = sys.unraisablehook, ("Event loop is closed", "TensorStore")

    def hook(args: Any) -> None:
        if not any(words in str(args.exc_value) for words in abandoned):
            report(args)

    sys.unraisablehook = hook


hush_orbax()


class Damaged(UserError):
    """A checkpoint cannot be read as it was written; the message names it and what is wrong."""


class Unsaved(UserError):
    """A checkpoint could not be written, for want of space perhaps; those before it are whole."""


class Writer:
    """Writes a run's checkpoints in the background and keeps the latest `keep`. Close it.

    `resumed` is the step this run was restored from; steps past it belong to a line of training
    that was given up (they were damaged), and the next save removes them.
    """

    def __init__(self, folder: str | Path, keep: int, resumed: int | None = None):
        found = steps(folder)
        self.latest = resumed if resumed is not None else max(found, default=None)
        self.stale = [s for s in found if self.latest is not None and s > self.latest]
        self.pending = None
        self.orbax = ocp.training.Checkpointer(
            Path(folder).absolute() / PLACE,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(
        self, step: int, trees: Mapping[str, Tree], metadata: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Save named `trees` and JSON `metadata` as `step`; nothing to do if it is the latest.

        The arrays may be donated as soon as this returns. A save that fails in the background is
        raised as Unsaved by the next save, `wait` or `close`.
        """
        if step != self.latest:
            self.wait()
            for stale in self.stale:
                self.orbax.delete(stale)
            named = {name: named_leaves(tree) for name, tree in trees.items()}
            record = {"metadata": metadata, "arrays": {n: describe(t) for n, t in named.items()}}
            self.pending = self.orbax.save_checkpointables_async(
                step,
                {name: stored for name in named if (stored := storable(named[name]))},
                force=True,  # the caller decides when
                custom_metadata=record | {"sha256": seal(record)},  # orbax adds no checksum
            )
            self.latest, self.stale = step, []
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the save in the background is on disk; raise Unsaved if it failed."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except (OSError, ValueError) as error:  # tensorstore's failures are ValueErrors
            with contextlib.suppress(OSError, ValueError):
                self.orbax.wait()  # the same error once more, or the next save would raise it
            step, self.latest = self.latest, None
            raise Unsaved(f"step {step} could not be saved: {reason_of(error)}") from None

    def close(self) -> None:
        """Wait for the save in the background, and let go of the folder."""
        try:
            self.wait()
        finally:
            self.orbax.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


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


def seal(record: dict[str, Any]) -> str:
    """SHA-256 of a JSON object's canonical text."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def place_of(folder: str | Path, step: int) -> Path:
    """The absolute path of a step: orbax takes no other."""
    return Path(folder).absolute() / PLACE / str(step)


def steps(folder: str | Path) -> list[int]:
    """The steps saved in a run's folder, ascending; half-written ones are not among them."""
    place = Path(folder) / PLACE
    inside = place.iterdir() if place.is_dir() else ()
    # orbax writes to a folder of another name and renames it at the end
    return sorted(int(p.name) for p in inside if p.name.isdecimal() and p.is_dir())


def read_metadata(folder: str | Path, step: int) -> dict[str, Any]:
    """The JSON saved with `step`, verified, without reading an array; Damaged if it is not."""
    return read_record(folder, step)["metadata"]


def read_shapes(folder: str | Path, step: int, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the tree saved as `name`, by leaf name, without reading an array."""
    described = read_record(folder, step)["arrays"].get(name, {})
    return {k: jax.ShapeDtypeStruct(d["shape"], d["dtype"]) for k, d in described.items()}


def read_record(folder: str | Path, step: int) -> dict[str, Any]:
    """What `save` noted of `step`: {"metadata": ..., "arrays": {tree: {leaf: description}}}."""
    path = place_of(folder, step)
    require(path.is_dir(), f"no checkpoint of step {step} in {folder}: it has {steps(folder)}")
    record = reading(path, lambda: dict(ocp.checkpointables_metadata(path).custom_metadata))
    if record.pop("sha256", None) != seal(record):
        raise Damaged(f"{path} is damaged: its metadata differ from their digest")
    return record


def restore(folder: str | Path, step: int, name: str, like: Tree) -> Tree:
    """The tree saved as `name`, verified, without reading the others.

    `like`: ShapeDtypeStructs, whose shardings (any mesh; default: the first device) and dtypes
    the result has. UserError lists the leaves that are missing, unknown or of another shape;
    Damaged names an array that cannot be read or differs from its digest.
    """
    path, wanted = place_of(folder, step), named_leaves(like)
    described = read_record(folder, step)["arrays"].get(name, {})
    require_same_shapes(path / name, described, wanted)
    arrays, found = reading(path / name, lambda: load(path, name, described, wanted))
    wrong = [leaf for leaf in arrays if found[leaf] != described[leaf]["digest"]]
    if wrong:
        raise Damaged(f"{path / name} is damaged: {', '.join(wrong)}: not what was saved")
    leaves = [arrays[leaf].astype(x.dtype) for leaf, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def require_same_shapes(path: Path, described: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError with a line for each leaf that is not in both, or not of one shape."""
    stored = {leaf: tuple(d["shape"]) for leaf, d in described.items()}
    expected = {leaf: tuple(x.shape) for leaf, x in wanted.items()}
    lines = [
        f"\n  {leaf}: stored {stored.get(leaf, 'none')}, expected {expected.get(leaf, 'none')}"
        for leaf in expected | stored
        if stored.get(leaf) != expected.get(leaf)
    ]
    require(not lines, f"{path} does not fit this configuration:{''.join(lines)}")


def load(
    path: Path, name: str, described: dict[str, Any], wanted: dict[str, Any]
) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """The arrays of one tree in the dtypes they were saved in, and the digests they now have."""
    first = SingleDeviceSharding(jax.devices()[0])
    like = {
        leaf: jax.ShapeDtypeStruct(
            x.shape, described[leaf]["dtype"], sharding=getattr(x, "sharding", None) or first
        )
        for leaf, x in wanted.items()
    }
    stored = storable(like)
    arrays = ocp.load_checkpointables(path, {name: stored})[name] if stored else {}
    for leaf in like.keys() - stored.keys():
        arrays[leaf] = jnp.zeros(like[leaf].shape, like[leaf].dtype, device=like[leaf].sharding)
    return arrays, digest(arrays)


def reading(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns; whatever orbax makes of an unreadable file is raised as Damaged."""
    try:
        return read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # these say nothing about the files
    except Exception as error:
        raise Damaged(f"{path} is damaged: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """The first cause of an error of orbax, which wraps the reason, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:400]}"


def latest_good(folder: str | Path, load: Callable[[int], T]) -> tuple[int, T, list[str]]:
    """The newest step that `load` can read, what it returned, and a line per damaged newer one.

    UserError when there is no checkpoint, or none that is whole.
    """
    found = steps(folder)
    require(bool(found), f"no checkpoint in {folder}: expected a run's folder made by train.py")
    damaged: list[str] = []
    for step in reversed(found):
        try:
            return step, load(step), damaged
        except Damaged as error:
            damaged.append(str(error))
    raise UserError(f"no checkpoint in {folder} is whole: " + "; ".join(damaged))
