"""Reading checkpoints back: verified, onto any mesh, refused before memory is taken."""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gpt import distributed
from gpt.checkpoint.folder import Damaged, place_of, steps
from gpt.checkpoint.record import read_record, reading
from gpt.checkpoint.writing import storable
from gpt.digest import digest, named_leaves
from gpt.errors import UserError, require

T = TypeVar("T")
Tree = Any  # a pytree of jax arrays, or of ShapeDtypeStructs


def restore(folder: str | Path, step: int, name: str, like: Tree) -> Tree:
    """The tree saved as `name`, verified, without reading the others.

    `like`: ShapeDtypeStructs, whose shardings (any mesh; default: the first device) and dtypes
    the result has. UserError lists the leaves that are missing, unknown or of another shape, or
    says that no such tree fits the memory; Damaged names an array that cannot be read or differs
    from its digest.
    """
    path, wanted = place_of(folder, step), named_leaves(like)
    with unreadable_in_all(path / name):
        described = read_record(folder, step)["arrays"].get(name, {})
        require_same_shapes(path / name, described, wanted)
        require_memory(path / name, described)
    with unreadable_in_all(path / name):
        arrays = reading(path / name, lambda: load(path, name, described, wanted))
    found = digest(arrays)
    wrong = [leaf for leaf in arrays if found[leaf] != described[leaf]["digest"]]
    if wrong:
        raise Damaged(f"{path / name} is damaged: {', '.join(wrong)}: not what was saved")
    leaves = [arrays[leaf].astype(x.dtype) for leaf, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def unreadable_in_all(path: Path) -> AbstractContextManager:
    """Of several processes none reads on alone, or falls back alone to an earlier checkpoint."""
    return distributed.all_or_none(Damaged(f"{path} cannot be read by another process"))


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


def require_memory(path: Path, described: dict[str, Any]) -> None:
    """Raise UserError if these arrays are larger than all memory there is: nobody saved them."""
    needed = sum(math.prod(d["shape"]) * jnp.dtype(d["dtype"]).itemsize for d in described.values())
    there = memory()
    require(
        there is None or needed <= there,
        f"{path} asks for {needed / 2**30:,.1f} GiB, more than the {(there or 0) / 2**30:,.1f} GiB "
        "of memory here: use more devices, or do not trust this checkpoint",
    )


def memory() -> int | None:
    """Bytes of memory on all devices together, or None where the system does not say."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] * jax.device_count()
    if hasattr(os, "sysconf"):  # the host's own, on CPU
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * jax.process_count()
    return None


def load(
    path: Path, name: str, described: dict[str, Any], wanted: dict[str, Any]
) -> dict[str, jax.Array]:
    """The arrays of one tree in the dtypes they were saved in."""
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
    return arrays


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
