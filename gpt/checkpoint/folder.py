"""Where checkpoints lie in a run's folder, and what can be wrong with one."""

from pathlib import Path

from gpt.errors import UserError

PLACE = "checkpoints"
HALF = ".orbax-checkpoint-tmp"  # orbax writes to a folder of this ending, and renames it


class Damaged(UserError):
    """A checkpoint cannot be read as it was written; the message names it and what is wrong."""


class Unsaved(UserError):
    """A checkpoint could not be written, for want of space perhaps; those before it are whole."""


def place_of(folder: str | Path, step: int) -> Path:
    """The absolute path of a step: orbax takes no other."""
    return Path(folder).absolute() / PLACE / str(step)


def steps(folder: str | Path) -> list[int]:
    """The steps saved in a run's folder, ascending; half-written ones are not among them."""
    return sorted(int(path.name) for path in inside(folder) if path.name.isdecimal())


def half_written(folder: str | Path) -> list[Path]:
    """What saves that were broken off have left."""
    return [path for path in inside(folder) if path.name.endswith(HALF)]


def inside(folder: str | Path) -> list[Path]:
    """The folders among the checkpoints: whole steps, half-written ones, and strangers."""
    place = Path(folder) / PLACE
    return [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []


def reason_of(error: BaseException) -> str:
    """The first cause of an error of orbax, which wraps the reason, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:400]}"
