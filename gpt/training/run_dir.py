"""Folders held by one process at a time: a run's, the cache's. Knows no checkpoints, no JAX."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gpt.errors import UserError, require

try:
    import fcntl
except ImportError:  # Windows: there nobody is refused
    fcntl = None

LOCK = ".lock"


def require_folder(out: Path) -> None:
    """UserError unless a run can be kept in `out`, which need not exist yet."""
    nearest = next(path for path in (out, *out.parents) if path.exists())
    require(
        nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        f"--out {out} cannot be used: {nearest} is not a folder that you may write to; "
        "choose another --out",
    )


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Have the folder `out` for this process alone; UserError if another process has it.

    It is made if need be, and gone afterwards if nothing was put there. What a dead process held
    is free: the system lets go of it.
    """
    require_folder(out)
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    file = lock(out)
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)  # before letting go: no other can hold it yet
        file.close()
        with contextlib.suppress(OSError):  # not empty, or gone
            for path in made:
                path.rmdir()


def lock(out: Path) -> TextIO:
    """The locked file: open for as long as the lock is to last."""
    while True:
        file = (out / LOCK).open("a")  # to write: NFS locks no other
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another train.py is at work in {out}: wait for it, stop it, or choose another "
                "--out"
            ) from None
        except OSError:
            return file  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(out / LOCK)):
                return file
        file.close()  # of one who has just left, and has removed it


def require_shared(out: Path) -> None:
    """UserError unless the folder that the first process of a run has made is seen here too."""
    require(
        out.is_dir(),
        f"--out {out} is not seen by all processes of the run: choose a folder on storage that "
        "they share",
    )


@contextlib.contextmanager
def wait_for(path: Path) -> Iterator[None]:
    """Have the lock file `path` alone, when whoever holds it now is done.

    It stays, empty. Where none can be made, or the file system has no locks, nobody waits.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
