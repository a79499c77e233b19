"""A run's folder: its lock, and the files a run writes there besides `checkpoints/`."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gpt import checkpoint, distributed
from gpt.errors import UserError, require

LOCK = ".lock"
# A killed process may leave `.new` files behind.
WRITTEN = (
    "metrics.jsonl",  # losses, evaluations and speed
    "metrics.jsonl.new",
    "samples.jsonl",  # what the model wrote during training
    "samples.jsonl.new",
    "evaluations.jsonl",  # by python -m gpt.evaluate
    "tokenizer.json",  # for people; each checkpoint has its own copy
    "tracking-id",  # the run's id in Weights & Biases and Trackio
    "loss.png",
    "loss.new",
    "tensorboard/events.out.tfevents.*",
    "profile/plugins/profile/[0-9]*/*",  # by --profile
)


@contextlib.contextmanager
def reserve(out: Path, is_trial: bool) -> Iterator[None]:
    """Reserve the folder `out` for this run's processes; a trial only checks that it is writable.

    Raises UserError in all processes if the folder cannot be used.
    """
    if is_trial:
        require_writable(out)
        yield
        return
    with contextlib.ExitStack() as stack:
        with distributed.fail_together():
            if distributed.is_first():
                stack.enter_context(lock_run(out))
        with distributed.fail_together():
            require(
                out.is_dir(),
                f"--out {out} is not visible to all processes of the run: choose a folder on "
                "shared storage",
            )
        yield


def require_writable(out: Path) -> None:
    """Raise UserError unless `out`, which need not exist yet, can be written to."""
    nearest = next(path for path in (out, *out.parents) if path.exists())
    require(
        nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        f"--out {out} cannot be used: {nearest} is not a folder you can write to; "
        "choose another --out",
    )


@contextlib.contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Reserve the folder `out` for this process; raise UserError if another process uses it.

    The folder is created if needed, and removed afterwards if it is still empty. If the process
    dies, the operating system releases its lock.
    """
    require_writable(out)
    created = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"another train.py is using {out}: wait for it, stop it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)  # before releasing it, while nobody else can hold it
        lock.release()
        with contextlib.suppress(OSError):  # not empty, or already removed
            for path in created:
                path.rmdir()


def remove_run(out: Path) -> None:
    """Remove what a run wrote in its folder and nothing else."""
    for step in checkpoint.saved_steps(out):
        shutil.rmtree(checkpoint.step_dir(out, step))
    for pattern in WRITTEN:
        for path in out.glob(pattern):
            path.unlink()
    for folder in (out / "profile", out / "tensorboard"):
        for path in sorted([folder, *folder.rglob("*")], reverse=True):  # innermost first
            with contextlib.suppress(OSError):  # not empty: it holds other files
                path.rmdir()
