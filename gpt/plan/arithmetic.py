"""The bytes that a mesh must move, by the config alone: what a compiled program is held against.

A row is (what, axes): arrays gathered or reduced over those axes of the mesh, and their bytes in a
step on one device: whole after a gather, whole before a reduction, whether the compiler writes that
as an all-reduce or scatters the sum. Small things (norms, biases, sums of rows) count where they
are reduced with large ones.
Shape letters: see model/transformer.py.
"""

import math
from collections import Counter
from collections.abc import Mapping

import jax

from gpt import sharding
from gpt.config import ModelConfig, TrainConfig
from gpt.flops import ITEM_BYTES
from gpt.model import transformer
from gpt.training.loss import count_chunks, recomputes_logits

Row = tuple[str, tuple[str, ...]]
BATCH = ("data", "fsdp")


class Bytes(Counter):
    """Bytes by row; those over one device alone are none."""

    def __init__(self, mesh: Mapping[str, int]):
        super().__init__()
        self.mesh = mesh

    def move(self, what: str, axes: tuple[str, ...], n_bytes: float) -> None:
        """Count `n_bytes` more as gathered or reduced over `axes`."""
        several = tuple(name for name in axes if self.mesh[name] > 1)
        if several:
            self[what, several] += int(n_bytes)


def split(config: ModelConfig, mesh) -> dict[str, tuple[int, bool]]:
    """Of each weight, by its path: entries on a device when gathered over fsdp, and whether it is
    split over fsdp at all."""
    shapes, axes = transformer.abstract(config), transformer.logical_axes(config)
    names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    found = {}
    for (path, leaf), named in zip(jax.tree_util.tree_leaves_with_path(shapes), names, strict=True):
        parts = sharding.fitting(mesh, leaf.shape, named)
        over = [mesh.shape[part] for part in parts if part == "tensor"]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = (math.prod(leaf.shape) // math.prod(over), "fsdp" in parts)
    return found


def training(config: TrainConfig, mesh, tpu: bool) -> Bytes:
    """Bytes of a training step. `tpu`: as the TPU compiler writes it, else as XLA's CPU compiler.

    A TPU's program adds up what flows back from several products of one input before it reduces
    the sum over tensor; and the loss's part of that after the last chunk of the vocabulary. Where
    there are micro-batches both serve the loss with the tied table that was gathered for the lookup
    (the CPU's after jax 0.10.2).
    """
    c, moved = config.model, Bytes(mesh.shape)
    item, kept = ITEM_BYTES[c.compute_dtype or "float32"], ITEM_BYTES[c.param_dtype]
    weights, batches = split(c, mesh), config.grad_accum
    rows = config.batch_size // batches // (mesh.shape["data"] * mesh.shape["fsdp"])
    stream = rows * config.window * c.d_model  # the residual stream on one device
    fsdp = mesh.shape["fsdp"]

    for name, (entries, is_split) in weights.items():
        if name.startswith("blocks/") and is_split:
            moved.move("gather", ("fsdp",), count_gathers(config, tpu) * entries * item)
            moved.move("reduce", ("fsdp",), batches * entries * item)
            moved.move("reduce", ("data",), batches * entries / fsdp * item)
        elif name.startswith("blocks/") or name.startswith("final_norm"):
            moved.move("reduce", BATCH, batches * entries * item)
    add_tables(moved, config, weights, item, kept, tpu)
    if mesh.shape["tensor"] > 1:
        add_tensor(moved, config, stream, rows * config.window, item, kept, tpu)
    return moved


def count_gathers(config: TrainConfig, tpu: bool) -> int:
    """Gathers of a block's matrix a step: forward and again for the way back; where nothing is
    computed again it is kept, and on a CPU gathered before all micro-batches."""
    if config.remat:
        return 2 * config.grad_accum
    return config.grad_accum if tpu else 1


def add_tables(
    moved: Bytes, config: TrainConfig, weights: dict, item: int, kept: int, tpu: bool
) -> None:
    """The embedding is gathered as kept for the lookup, whose gradient is summed whole; the head's
    table for the loss, in the type of the products, and once more where its backward pass computes
    the logits again."""
    batches, fsdp = config.grad_accum, moved.mesh["fsdp"]
    tokens = config.batch_size // batches * config.window  # of a micro-batch, on all devices
    for name in ("tokens", "positions"):
        entries, is_split = weights.get(name, (0, False))
        if is_split:
            moved.move("gather", ("fsdp",), entries * kept)
        moved.move("reduce", BATCH, batches * entries * kept)
    entries, is_split = weights["tokens" if config.model.tied else "head"]
    if is_split:
        at_hand = config.model.tied and batches > 1 and (tpu or jax.__version_info__ > (0, 10, 2))
        times = 0 if at_hand else 2 if recomputes_logits(tokens, config.model.padded_vocab) else 1
        moved.move("gather", ("fsdp",), times * batches * entries * item)
        moved.move("reduce", ("fsdp",), batches * entries * kept)
        moved.move("reduce", ("data",), batches * entries / fsdp * item)


def add_tensor(
    moved: Bytes, config: TrainConfig, stream: int, tokens: int, item: int, kept: int, tpu: bool
) -> None:
    """Two sums a block forward and as many back (Shoeybi et al. 2019, Megatron-LM, section 3), one
    more where the block is computed again; the lookup; and the loss, whose softmax needs four
    numbers a token and chunk of the vocabulary."""
    c, batches, chunks = config.model, config.grad_accum, count_chunks(config.model.padded_vocab)
    backward = 2 if tpu else 3 + (2 if c.mlp == "swiglu" else 1)
    sums = 2 + backward + (1 if config.remat else 0)
    moved.move("reduce", ("tensor",), batches * c.n_layers * sums * stream * item)
    moved.move("reduce", ("tensor",), batches * stream * kept)
    loss = stream * item * (1 if tpu else chunks) + 4 * chunks * tokens * 4
    moved.move("reduce", ("tensor",), batches * loss)


def decoding(config: ModelConfig, mesh, n_rows: int, n_tokens: int) -> Bytes:
    """Bytes of reading `n_tokens` of each of `n_rows` rows: two sums a block, the lookup, and the
    logits of one position of each row, which every device gets for its rows. No weight and nothing
    of the cache moves, where its heads divide among the devices."""
    moved = Bytes(mesh.shape)
    rows = n_rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    item = ITEM_BYTES[config.compute_dtype or "float32"]
    stream = rows * n_tokens * config.d_model
    moved.move("reduce", ("tensor",), 2 * config.n_layers * stream * item)
    moved.move("reduce", ("tensor",), stream * ITEM_BYTES[config.param_dtype])
    moved.move("gather", ("tensor",), rows * config.padded_vocab * 4)
    return moved
