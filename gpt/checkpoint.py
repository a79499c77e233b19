"""Checkpoints: named trees of arrays and some JSON, each with a digest; orbax does the writing.

Saves are atomic and run in the background. Reads are verified, because orbax loads flipped bits
without complaint. Arrays are stored under plain names (`blocks/attention/q/kernel`), so the files
depend on no Python class and no mesh. In a run's folder (run_dir.py lists its other files):

    checkpoints/500/                  after 500 steps
        params/                       weights
        optimizer/                    moments and the step number
        ema_params/                   averaged weights, with --ema-decay
        _CHECKPOINT_METADATA          settings, tokenizer, text (resume.checkpoint_metadata), and
                                      each array's shape, dtype and digest
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import math
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gpt import distributed
from gpt.digest import digest, named_leaves
from gpt.errors import UserError, require

Tree = Any  # a pytree of jax arrays, or of ShapeDtypeStructs
FORMAT = 2  # increment whenever older checkpoints can no longer be read
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
PARTIAL = ".orbax-checkpoint-tmp"  # orbax writes to a folder with this suffix, then renames it


class Damaged(UserError):
    """A checkpoint cannot be read back as written; the message names it and the reason."""


class SaveFailed(UserError):
    """A checkpoint could not be written; the message says why. Earlier ones are intact."""


def saved_steps(folder: str | Path) -> list[int]:
    """The steps saved in a run's folder, ascending; partly written ones are left out."""
    found = (Path(folder) / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdecimal() and path.is_dir())


def step_dir(folder: str | Path, step: int) -> Path:
    """The absolute path of one step's checkpoint."""
    return Path(folder).absolute() / "checkpoints" / str(step)


def require_run(folder: str | Path) -> None:
    """Raise UserError unless `folder` is a run's folder with a checkpoint."""
    folder = Path(folder)
    require(folder.exists(), f"no folder {folder}: expected a run's folder made by train.py")
    if (folder / "config.json").exists():
        advice = "; import this one first: python -m gpt.convert import FOLDER RUN"
    else:
        advice = advice_on_pickles(folder)
    require(
        bool(saved_steps(folder)),
        f"no checkpoint in {folder}: expected a run's folder made by train.py{advice}",
    )


def advice_on_pickles(path: Path) -> str:
    """What to do if `path` is another program's pickle, or a folder with one; else ""."""
    if not PICKLE_SUFFIXES & {file.suffix for file in (path, *path.glob("*"))}:
        return ""
    return (
        ". Opening a pickle can run arbitrary code, so none is opened here: if you trust it, load "
        "it with transformers and save it with save_pretrained(NEW_FOLDER); docs/weights.md says "
        "what to do with nanoGPT's ckpt.pt, and nanochat's models cannot be imported"
    )


class CheckpointManager(contextlib.AbstractContextManager):
    """Saves a run's checkpoints in the background and keeps the latest `keep` and the best. Leaving
    its `with` block waits for the last save.

    `keep_best`: how many of those with the lowest loss to keep as well. `resumed`: the step this
    run was restored from; later steps in the folder are damaged, and the next save replaces them.
    `low_memory`: write each array in pieces, to files of 32 MiB, instead of first collecting the
    whole compressed save in memory.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int,
        keep_best: int = 0,
        *,
        resumed: int | None = None,
        low_memory: bool = False,
    ):
        found = saved_steps(folder)
        self.folder = folder
        self.latest = max(found, default=None) if resumed is None else resumed
        self.abandoned = [s for s in found if self.latest is not None and s > self.latest]
        self.failed = False  # whether the previous save failed
        self._keep = keep
        self._keep_best = keep_best
        self._losses: dict[int, float | None] = {}
        for step in found if keep_best else []:
            with contextlib.suppress(Damaged):
                self._losses[step] = read_record(folder, step)["loss"]
        self._context = ocp.Context()
        if low_memory:
            self._context.array.saving.storage_options.chunk_byte_size = 2**25
            self._context.array.saving.use_ocdbt = False
        _quiet_orbax()
        with self._context:
            self._orbax = ocp.training.Checkpointer(
                Path(folder).absolute() / "checkpoints",
                preservation_policy=self,
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
        """Save named `trees` and JSON `metadata` as `step`.

        The best checkpoints are chosen by `loss`. The arrays may be donated as soon as this
        returns. If the save fails in the background, the next `save` or `wait` raises SaveFailed.
        """
        self.wait()
        if self.failed:  # a slow thread of that save may have written more since
            self._discard_partial()
            self.failed = False

        # All names, shapes and digests go into one JSON record, which has its own digest.
        arrays = {name: named_leaves(tree) for name, tree in trees.items()}
        described = {}
        for name, tree in arrays.items():
            digests = digest(tree)
            described[name] = {
                leaf: {"shape": list(x.shape), "dtype": x.dtype.name, "digest": digests[leaf]}
                for leaf, x in tree.items()
            }
        self._losses[step] = loss if loss is not None and math.isfinite(loss) else None
        record = {
            "format": FORMAT,
            "step": step,
            "loss": self._losses[step],
            "metadata": metadata,
            "arrays": described,
        }
        record["sha256"] = _sha256(record)

        with self._raising_save_failed(step), self._context:
            for abandoned in self.abandoned:
                self._orbax.delete(abandoned)
            self.abandoned = []
            self.latest = step
            # Forced, because the caller decides when to save.
            self._orbax.save_checkpointables_async(step, arrays, force=True, custom_metadata=record)
        if wait:
            self.wait()

    def try_save(self, trees: Mapping[str, Tree], metadata: dict[str, Any]) -> None:
        """Save as step 0 and delete it again, so that a SaveFailed is raised now, not later."""
        self.save(0, trees, metadata, wait=True)
        self._orbax.delete(0)
        self.latest = None

    def wait(self) -> None:
        """Wait until the background save is on disk; SaveFailed if it failed."""
        with self._raising_save_failed(self.latest):
            self._orbax.wait()

    def __exit__(self, *_) -> None:
        try:
            self.wait()
        finally:
            with contextlib.suppress(OSError, ValueError):
                self._orbax.close()  # raises again what `wait` has already raised

    @contextlib.contextmanager
    def _raising_save_failed(self, step: int) -> Iterator[None]:
        """Turn orbax's errors into SaveFailed, after removing what was partly written."""
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
            if distributed.is_lost_peer(error):
                raise
            self.failed = True
            with contextlib.suppress(OSError, ValueError):
                self._orbax.wait()  # otherwise the next save would raise the same error
            self._discard_partial()
            self._orbax.reload()
            self.latest = max(saved_steps(self.folder), default=None)
            kept = "no earlier checkpoint exists"
            if self.latest is not None:
                kept = f"the last good one is step {self.latest}"
            raise SaveFailed(
                f"the checkpoint of step {step} could not be saved in {self.folder}; {kept}: "
                f"{_reason(error)}"
            ) from None

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        """Tell orbax which checkpoints to keep. Its own BestN reads losses from a file without a
        digest, and fails if that is damaged."""
        saved = sorted(checkpoint.step for checkpoint in checkpoints)
        rated = [step for step in saved if self._losses.get(step) is not None]
        best = sorted(rated, key=lambda step: (self._losses[step], -step))[: self._keep_best]
        kept = {*saved[-self._keep :], *best}
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def _discard_partial(self) -> None:
        """Remove partly written checkpoints, whose space the next save needs."""
        if distributed.is_first():
            for path in (Path(self.folder) / "checkpoints").glob(f"*{PARTIAL}"):
                shutil.rmtree(path, ignore_errors=True)


def read_record(folder: str | Path, step: int) -> dict[str, Any]:
    """Everything `save` wrote besides the arrays: format, step, loss, metadata, and each array's
    shape, dtype and digest by tree and name. Damaged if any of it has changed."""
    path = step_dir(folder, step)
    require(
        path.is_dir(), f"no checkpoint of step {step} in {folder}: it has {saved_steps(folder)}"
    )
    with _raising_damaged(path):
        # Not read by orbax, which would start JAX's backend: these settings may include
        # --deterministic, which must be known before that.
        text = (path / "_CHECKPOINT_METADATA").read_text(encoding="utf-8")
        record = json.loads(text)["custom_metadata"]
    if record.pop("sha256", None) != _sha256(record):
        raise Damaged(f"{path} is damaged: its metadata does not match its digest")
    require(
        record.get("format") == FORMAT,
        f"{path} was made by another version of this project, which this one cannot read: train "
        "again, or use that version",
    )
    return record


def read_metadata(folder: str | Path, step: int) -> dict[str, Any]:
    """The JSON given to `save`, verified, without reading any array."""
    return read_record(folder, step)["metadata"]


def restore(folder: str | Path, step: int, name: str, like: Tree) -> Tree:
    """The tree saved as `name`, verified; the other trees are not read.

    `like`: ShapeDtypeStructs; the result has their shardings (default: the first device) and
    dtypes. UserError lists leaves that are missing, unknown or of the wrong shape, Damaged those
    that cannot be read or do not match their digest. With several processes all raise or none does,
    so that no process falls back to an earlier checkpoint alone.
    """
    path = step_dir(folder, step) / name
    elsewhere = Damaged(f"{path} cannot be read by another process")
    wanted = named_leaves(like)
    with distributed.all_or_none(elsewhere):
        described = read_record(folder, step)["arrays"].get(name, {})
        differing = ""
        for leaf in wanted | described:
            stored = tuple(described[leaf]["shape"]) if leaf in described else "none"
            expected = wanted[leaf].shape if leaf in wanted else "none"
            if stored != expected:
                differing += f"\n  {leaf}: stored {stored}, expected {expected}"
        require(not differing, f"{path} does not fit this configuration:{differing}")

    # Read each array in its saved dtype, since its digest was computed in that.
    first_device = SingleDeviceSharding(jax.devices()[0])
    saved_as = {}
    for leaf, x in wanted.items():
        sharding = getattr(x, "sharding", None) or first_device
        saved_as[leaf] = jax.ShapeDtypeStruct(x.shape, described[leaf]["dtype"], sharding=sharding)
    with distributed.all_or_none(elsewhere), _raising_damaged(path):
        arrays = ocp.load_checkpointables(path.parent, {name: saved_as})[name]

    found = digest(arrays)
    changed = [leaf for leaf in wanted if found[leaf] != described[leaf]["digest"]]
    if changed:
        raise Damaged(f"{path} is damaged: {', '.join(changed)}: not what was saved")
    leaves = [arrays[leaf].astype(x.dtype) for leaf, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def latest_good(folder: str | Path, load: Callable[[int], Any]) -> tuple[int, Any, list[str]]:
    """The newest step that `load` can read, what it returned, and a line per damaged newer one.

    Raises UserError if no intact checkpoint exists.
    """
    require_run(folder)
    damaged: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            return step, load(step), damaged
        except Damaged as error:
            damaged.append(str(error))
    raise UserError(f"no checkpoint in {folder} is intact: " + "; ".join(damaged))


def _sha256(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _raising_damaged(path: Path) -> Iterator[None]:
    """Turn whatever orbax raises for an unreadable file into Damaged."""
    _quiet_orbax()
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # never awaited
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # these do not mean that the files are damaged
        except Exception as error:
            reason = _reason(error)
            # Free what orbax started and never awaited; at exit, Python would warn about it.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            raise Damaged(f"{path} is damaged: {reason}") from None


def _reason(error: BaseException) -> str:
    """The root cause of an error from orbax, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:400]}"


@functools.cache
def _quiet_orbax() -> None:
    """Keep orbax's own reports off the terminal: it raises every failure as well. When one read
    fails, it abandons others, which report errors from their own threads later."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    report_others = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if not re.search("Event loop is closed|TensorStore", str(unraisable.exc_value)):
            report_others(unraisable)

    sys.unraisablehook = report
