"""The mesh, and the one table from logical axes to mesh axes. Knows no model.

Weights, optimizer state, activations and the KV cache name their axes; this table says over which
axis of the mesh each name is split. An axis that its devices do not divide is kept whole on each.
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
        # Lays each axis along a ring of neighbouring devices where the hardware has one.
        return jax.make_mesh(filled, AXES, axis_types=axis_types, devices=devices)
    except (NotImplementedError, AssertionError, ValueError):
        # No such rings: several slices, a part of one, or an axis that is none of the hardware's.
        return Mesh(np.reshape(devices, filled), AXES, axis_types=axis_types)


def make_decoding_mesh(config: MeshConfig) -> Mesh:
    """A mesh of the first devices that `config` asks for; UserError if there are too few."""
    sizes = (config.data, config.fsdp, config.tensor)
    devices = jax.devices()
    return make_mesh(config, devices if -1 in sizes else devices[: int(np.prod(sizes))])


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Trace and run on `mesh`: `constrain` takes effect inside. None: where JAX puts things."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def fitting(mesh, shape: tuple[int, ...], axes: tuple, rules: dict = RULES) -> PartitionSpec:
    """The partition of an array of that shape whose axes bear these names (None: not split): split
    only where it divides, and over axes of the mesh that no `shard_map` has split already."""
    kept = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(name for name in rules.get(axis, ()) if name not in mesh.manual_axes)
        n_parts = math.prod(mesh.shape[name] for name in names)
        kept.append(names if names and size % n_parts == 0 else None)
    return PartitionSpec(*kept)


def mesh_in_force() -> AbstractMesh | None:
    """The mesh that is traced for and over which the compiler splits arrays; None where there is
    one device, a mesh that is not ours, such as pmap's, or inside a `shard_map` that leaves the
    compiler no axis to split."""
    mesh = jax.sharding.get_abstract_mesh()
    is_ours = set(AXES) <= set(mesh.axis_names)
    n_parts = math.prod(mesh.shape[axis] for axis in mesh.auto_axes)
    return mesh if is_ours and n_parts > 1 else None


def split_over(axis: str) -> tuple[str, ...]:
    """The axes of the mesh in force over which the compiler splits an axis of that name."""
    mesh = mesh_in_force()
    if mesh is None:
        return ()
    return tuple(name for name in RULES[axis] if name in mesh.auto_axes)


def count_parts(axis: str) -> int:
    """Parts into which the mesh in force splits an axis of that name."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in split_over(axis))


def target_device():
    """What the program being traced is for, which need not be here; has `platform` and
    `device_kind`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0] if device is None else device


def platform() -> str:
    """The platform of the devices that the program being traced is for: cpu, gpu, tpu."""
    return platform_of(target_device())


def platform_of(device) -> str:
    """The platform of a device: cpu, gpu, tpu."""
    return "gpu" if device.platform == "cuda" else device.platform  # cuda: where it is absent


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, partitioned as its logical axes say, if there is a mesh in force."""
    mesh = mesh_in_force()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, x.shape, axes))


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of a batch whose rows lie along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))


def state_shardings(mesh: Mesh, axes: dict, state, rules: dict = RULES):
    """Shardings for `state`: a leaf takes that of the weight whose path its own path ends with.

    `axes` is the tree of logical axes of the weights. Adam's moments, Muon's momentum and averages
    repeat the paths of the weights below a prefix; what matches no weight is replicated. Inference
    by the compiler would replicate the moments too.
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
    """A tree of shape structs, with the shardings that the other tree has in the same places."""
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings)
