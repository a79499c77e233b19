"""The mesh and the table of axes, where they need no devices: see test_mesh.py for those."""

import itertools

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from gpt import sharding
from gpt.checkpoint import named_leaves
from gpt.config import MeshConfig, ModelConfig, TrainConfig
from gpt.errors import UserError
from gpt.model import transformer
from gpt.training import step_functions, train_state

MODEL = ModelConfig(300, context_length=16, n_layers=2, n_heads=4, d_model=32)
CONFIG = TrainConfig(model=MODEL, ema_decay=0.9)


class FakeTpu:
    """A chip of a TPU v5e as far as JAX's arrangement of devices asks."""

    platform, device_kind, client = "tpu", "TPU v5 lite", None
    process_index = slice_index = core_on_chip = 0

    def __init__(self, number, coords):
        self.id, self.coords = number, coords


def tpu_slice(*shape):
    """The chips of a slice in the order in which JAX lists them: x runs fastest."""
    coords = [(x, y, 0) for y in range(shape[1]) for x in range(shape[0])]
    return [FakeTpu(number, place) for number, place in enumerate(coords)]


def mesh_of(*sizes):
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def test_an_axis_is_a_ring_of_neighbours():
    """Listed in order, the eight chips of a 4 x 2 slice jump back at the end of each row."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=8), tpu_slice(4, 2))
    ring = [device.coords for device in mesh.devices.flat]
    for a, b in itertools.pairwise([*ring, ring[0]]):
        assert np.abs(np.subtract(a, b)).sum() == 1
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_devices_without_rings_make_a_mesh_all_the_same():
    part = tpu_slice(4, 2)[:6]
    assert list(sharding.make_mesh(MeshConfig(fsdp=6), part).devices.flat) == part


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)])
def test_weights_moments_and_average_are_split_over_their_axes(sizes):
    """By the sizes of the mesh, not by the table that is tested."""
    _, fsdp, tensor = sizes
    parts_of = {"embed": fsdp, "vocab": tensor, "heads": tensor, "kv_heads": tensor, "mlp": tensor}
    state = train_state.abstract_state(CONFIG, mesh_of(*sizes))
    axes = named_leaves(transformer.logical_axes(MODEL))
    counted = 0
    for path, leaf in named_leaves(state).items():
        weight = next((name for name in axes if path.endswith(name) and leaf.ndim), None)
        names = axes[weight] if weight else (None,) * leaf.ndim
        split = [n // parts_of.get(name, 1) for n, name in zip(leaf.shape, names, strict=True)]
        assert leaf.sharding.shard_shape(leaf.shape) == tuple(split), path
        counted += weight is not None
    assert counted == 4 * len(axes)


def test_heads_that_do_not_divide_are_kept_whole_and_told():
    few = ModelConfig(300, context_length=16, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32)
    mesh = mesh_of(1, 1, 4)
    assert transformer.require_even_split(few, mesh) == [
        "2 key/value heads do not divide evenly among 4 devices, so each keeps them all"
    ]
    state = train_state.abstract_state(TrainConfig(model=few), mesh)
    attention = state.params["blocks"]["attention"]
    split = {name: "tensor" in attention[name]["kernel"].sharding.spec for name in "qkvo"}
    assert split == {"q": True, "k": False, "v": False, "o": True}


def test_what_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"fsdp 3, .* does not fill 8 devices"):
        sharding.make_mesh(MeshConfig(fsdp=3), tpu_slice(4, 2))
    for sizes, words in (((1, 1, 3), "n_heads is 4, which --mesh.tensor 3"), ((1, 5, 1), "fsdp 5")):
        with pytest.raises(UserError, match=words):
            transformer.require_even_split(MODEL, mesh_of(*sizes))
    config = TrainConfig(batch_size=8, grad_accum=8)
    with pytest.raises(UserError, match=r"a micro-batch of 1 sequences .* among 4 devices"):
        step_functions.require_even_split(config, mesh_of(2, 2, 2))
