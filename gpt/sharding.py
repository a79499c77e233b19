"""The mesh, and the one table that maps logical axes to mesh axes, independent of any model.

Weights, optimizer state, activations and the KV cache name their axes; the table says which mesh
axes each name is split over. An axis that does not divide evenly is replicated.
"""

import contextlib
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from gpt.config import MeshConfig
from gpt.errors import require

AXES = ("data", "fsdp", "tensor")
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}
# Weights gathered at each decode step would cost more than the step.
DECODING_RULES = RULES | {"embed": ()}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of `devices` (default: all) with axes data, fsdp, tensor.

    UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = int(np.prod([n for n in sizes if n != -1]))
    filled = [len(devices) // fixed if n == -1 else n for n in sizes]
    used = int(np.prod(filled))
    require(
        used == len(devices),
        f"a mesh of data {config.data}, fsdp {config.fsdp}, tensor {config.tensor} does not fill "
        f"{len(devices)} devices: change --mesh.data, --mesh.fsdp or --mesh.tensor",
    )
    axis_types = (AxisType.Auto,) * 3
    try:
        # Lays each axis along a ring of neighboring devices if the hardware has one.
        return jax.make_mesh(filled, AXES, axis_types=axis_types, devices=devices)
    except (NotImplementedError, AssertionError, ValueError):
        # No such rings: several slices, part of one, or an axis that the hardware does not have.
        return Mesh(np.reshape(devices, filled), AXES, axis_types=axis_types)


def make_decoding_mesh(config: MeshConfig) -> Mesh:
    """A mesh of as many of the first devices as `config` needs; UserError if there are too few."""
    sizes = (config.data, config.fsdp, config.tensor)
    devices = jax.devices()
    return make_mesh(config, devices if -1 in sizes else devices[: int(np.prod(sizes))])


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Trace and run on `mesh`, so that `constrain` takes effect; None: on JAX's default device."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def fitting(mesh, shape: tuple[int, ...], axes: tuple, rules: dict = RULES) -> PartitionSpec:
    """The PartitionSpec of an array with this shape and these logical axes (None: not split). An
    axis is split only if it divides evenly, and only over mesh axes no `shard_map` has split."""
    kept = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(name for name in rules.get(axis, ()) if name not in mesh.manual_axes)
        n_parts = math.prod(mesh.shape[name] for name in names)
        kept.append(names if names and size % n_parts == 0 else None)
    return PartitionSpec(*kept)


def mesh_in_force() -> AbstractMesh | None:
    """The mesh being traced, if the compiler may still shard over it. None for a single device, for
    a mesh that is not ours, such as pmap's, and inside a `shard_map` that leaves the compiler no
    axis to split."""
    mesh = jax.sharding.get_abstract_mesh()
    is_ours = set(AXES) <= set(mesh.axis_names)
    n_parts = math.prod(mesh.shape[axis] for axis in mesh.auto_axes)
    return mesh if is_ours and n_parts > 1 else None


def split_over(axis: str) -> tuple[str, ...]:
    """The current mesh axes that the compiler splits logical axis `axis` over."""
    mesh = mesh_in_force()
    if mesh is None:
        return ()
    return tuple(name for name in RULES[axis] if name in mesh.auto_axes)


def count_parts(axis: str) -> int:
    """The number of parts that logical axis `axis` is split into on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in split_over(axis))


def target_device():
    """The device being traced for, which need not be present; it has `platform` and
    `device_kind`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0] if device is None else device


def platform() -> str:
    """The platform being traced for: cpu, gpu or tpu."""
    return platform_of(target_device())


def platform_of(device) -> str:
    """A device's platform: cpu, gpu or tpu."""
    return "gpu" if device.platform == "cuda" else device.platform  # absent GPUs say cuda


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, sharded by its logical axes if there is a current mesh."""
    mesh = mesh_in_force()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, x.shape, axes))


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of a batch with its rows along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))


def state_shardings(mesh: Mesh, axes: dict, state, rules: dict = RULES):
    """Shardings for `state`: a leaf is sharded like the weight whose path its own path ends with.

    `axes` is the weights' tree of logical axes. Adam's moments, Muon's momentum and averages repeat
    the weights' paths under a prefix; leaves that match no weight are replicated. If left to the
    compiler, the moments would be replicated too.
    """
    axes_by_path = {tuple(path): names for path, names in tree_leaves_with_path(axes)}

    def sharding_of(path: tuple, leaf) -> NamedSharding:
        names = (None,) * leaf.ndim
        for start in range(len(path)):
            found = axes_by_path.get(path[start:])
            if found is not None and len(found) == leaf.ndim:
                names = tuple(found)
                break
        return NamedSharding(mesh, fitting(mesh, leaf.shape, names, rules))

    return tree_map_with_path(sharding_of, state)


def with_shardings(shapes, shardings):
    """A tree of ShapeDtypeStructs with the shardings of a second tree added."""
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings)
