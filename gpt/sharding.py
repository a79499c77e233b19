"""The mesh, and the one table from logical axes to mesh axes. Knows no model.

Weights, optimizer state, activations and the KV cache name their axes; this table says over which
axis of the mesh each name is split. Nothing else in the project mentions a mesh axis.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from gpt.config import MeshConfig
from gpt.errors import require

RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of `devices` (default: all) with axes data, fsdp, tensor; UserError if they misfit."""
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
    grid = np.asarray(devices).reshape(filled)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace and run on `mesh`: `constrain` takes effect inside."""
    with jax.set_mesh(mesh):
        yield


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array whose axes bear these names (None: not split)."""
    return PartitionSpec(*(RULES.get(axis) for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, partitioned as its logical axes say; unchanged where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of a batch whose rows lie along `axis`."""
    return NamedSharding(mesh, spec(*[None] * axis, "batch"))


def state_shardings(mesh: Mesh, axes: dict, state):
    """Shardings for `state`: a leaf takes that of the weight whose path its own path ends with.

    `axes` is the tree of logical axes of the weights. Adam's moments, Muon's momentum and averages
    repeat the paths of the weights below a prefix; what matches no weight is replicated. Inference
    by the compiler would replicate the moments too.
    """
    leaves = tree_leaves_with_path(axes, is_leaf=lambda a: isinstance(a, tuple))
    weights = {path: NamedSharding(mesh, spec(*names)) for path, names in leaves}
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(path, leaf):
        tails = (path[start:] for start in range(len(path)))
        found = (weights[tail] for tail in tails if tail in weights)
        return next((s for s in found if len(s.spec) == leaf.ndim), replicated)

    return tree_map_with_path(one, state)
