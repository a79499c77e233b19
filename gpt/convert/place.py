"""A folder that is there whole or not at all. Knows nothing of what is in it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt.errors import UserError, require


def require_new(dest: Path) -> None:
    """UserError if there is something at `dest` already."""
    there = dest.exists() and not (dest.is_dir() and not any(dest.iterdir()))
    require(not there, f"{dest} is there already: name a new folder, or remove it first")


@contextmanager
def making(dest: Path) -> Iterator[Path]:
    """A folder beside `dest` to be filled: it becomes `dest`, or is gone if filling it failed.

    UserError where the system lets nothing be written.
    """
    place = dest.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=place.parent) as scratch:
            folder = Path(scratch) / "folder"  # whose rights are those of any folder
            folder.mkdir()
            yield folder
            os.replace(folder, place)
    except OSError as error:
        raise UserError(f"{dest} cannot be written: {error.strerror or error}") from None
