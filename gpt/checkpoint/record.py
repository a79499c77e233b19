"""What a checkpoint says of itself: JSON with a digest, read before any array and not trusted.

Knows of arrays only their shapes, types and digests.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from gpt.checkpoint.folder import Damaged, place_of, reason_of, steps
from gpt.errors import UserError, require

T = TypeVar("T")
MOST_JSON = 2**26  # bytes in a file beside the arrays: a vocabulary of millions, not a disk


class Metadata(dict):
    """The JSON object that was saved with a step; a name that it lacks is a user's error."""

    def __missing__(self, name: str):
        raise UserError(f"the checkpoint does not say its {name!r}: made by another program?")


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of its canonical text: orbax adds no checksum."""
    return record | {
        "sha256": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    }


def read_metadata(folder: str | Path, step: int) -> Metadata:
    """The JSON saved with `step`, verified, without reading an array; Damaged if it is not."""
    return Metadata(read_record(folder, step)["metadata"])


def read_shapes(folder: str | Path, step: int, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the tree saved as `name`, by leaf name, without reading an array."""
    described = read_record(folder, step)["arrays"].get(name, {})
    return {k: jax.ShapeDtypeStruct(d["shape"], d["dtype"]) for k, d in described.items()}


def read_record(folder: str | Path, step: int) -> dict[str, Any]:
    """What `save` noted of `step`: {"metadata": ..., "arrays": {tree: {leaf: description}}, ...}.

    Damaged if it was changed, is too large to be one, or was saved as another step.
    """
    path = place_of(folder, step)
    require(path.is_dir(), f"no checkpoint of step {step} in {folder}: it has {steps(folder)}")
    require_small(path)
    record = reading(path, lambda: dict(ocp.checkpointables_metadata(path).custom_metadata))
    sealed = {name: value for name, value in record.items() if name != "sha256"}
    if record != seal(sealed):
        raise Damaged(f"{path} is damaged: its metadata differ from their digest")
    if not well_formed(record):
        raise Damaged(f"{path} is damaged: its metadata are not those of a checkpoint")
    if record.get("step", step) != step:
        raise Damaged(f"{path} is damaged: it was saved as step {record['step']}")
    return record


def require_small(path: Path) -> None:
    """Damaged if a file beside the arrays is larger than any that was ever saved: it is read whole.

    Arrays lie in folders called `d`.
    """
    for file in path.rglob("*"):
        if file.parent.name != "d" and file.is_file() and file.stat().st_size > MOST_JSON:
            raise Damaged(f"{path} is damaged: {file.name} has {file.stat().st_size:,} bytes")


def well_formed(record: dict[str, Any]) -> bool:
    """Whether the parts of a record have the types that they were saved with."""
    metadata, arrays = record.get("metadata"), record.get("arrays")
    if not isinstance(metadata, dict) or not isinstance(arrays, dict):
        return False
    trees = [tree for tree in arrays.values() if isinstance(tree, dict)]
    return len(trees) == len(arrays) and all(is_array(d) for tree in trees for d in tree.values())


def is_array(described: Any) -> bool:
    """Whether something describes an array: its shape, dtype and digest."""
    try:
        jax.numpy.dtype(described["dtype"])
        sizes = [*described["shape"], described["digest"]]
        return all(type(n) is int and n >= 0 for n in sizes)
    except (KeyError, TypeError):
        return False


def reading(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns; whatever orbax makes of an unreadable file is raised as Damaged."""
    try:
        return read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # these say nothing about the files
    except Exception as error:
        raise Damaged(f"{path} is damaged: {reason_of(error)}") from None
