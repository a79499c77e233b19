"""The bytes that a mesh must move in a step, predicted from the config alone.

benchmarks/pods.py and tests/plan/test_plan.py compare compiled programs with this. The predictions
describe the output of XLA's CPU and TPU compilers in jax 0.10 to 0.12.

A row is (what, axes): arrays gathered or reduced over those mesh axes. Its bytes are per device
and step: the whole array's, after a gather or before a reduction, whether the compiler writes an
all-reduce or scatters the sum. Small arrays (norms, biases, row sums) count if they are reduced
together with large ones.
Shape letters: gpt/model/transformer.py.
"""

import math
from collections import Counter
from collections.abc import Mapping

import jax

from gpt import sharding
from gpt.config import ModelConfig, TrainConfig
from gpt.flops import ITEM_BYTES
from gpt.model import transformer
from gpt.training import step_functions
from gpt.training.loss import KEPT_LOGITS, count_chunks

Row = tuple[str, tuple[str, ...]]
BATCH = ("data", "fsdp")
WHAT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "reduce"}


def moved(program: Mapping, mesh: Mapping[str, int]) -> Counter:
    """Bytes by row of a planned program's collectives (train.py --json), for a mesh of these sizes:
    rings send all but a device's own part, twice in an all-reduce (Chan et al. 2007)."""
    rows = Counter()
    for names, kinds in program["sent"].items():
        axes = tuple(name for name in mesh if name in names.split("+"))
        n = math.prod(mesh[name] for name in axes)
        for kind, total in kinds.items():
            whole = total["bytes"]
            if kind in WHAT:
                whole *= n / (n - 1) / (2 if kind == "all-reduce" else 1)
            rows[WHAT.get(kind, kind), axes] += round(whole)
    return rows


class Bytes(Counter):
    """Bytes by row. Axes with a single device move nothing."""

    def __init__(self, mesh: Mapping[str, int]):
        super().__init__()
        self.mesh = mesh

    def move(self, what: str, axes: tuple[str, ...], n_bytes: float) -> None:
        """Count `n_bytes` more as gathered or reduced over `axes`."""
        several = tuple(name for name in axes if self.mesh[name] > 1)
        if several:
            self[what, several] += int(n_bytes)


def matrices(config: ModelConfig, mesh) -> dict[str, tuple[int, bool]]:
    """For each weight, by path: its entries on a device once gathered over fsdp, and whether it is
    sharded over fsdp."""
    shapes, axes = transformer.abstract(config), transformer.logical_axes(config)
    names = jax.tree.leaves(axes)
    found = {}
    for (path, leaf), named in zip(jax.tree_util.tree_leaves_with_path(shapes), names, strict=True):
        parts = sharding.fitting(mesh, leaf.shape, named)
        n_parts = math.prod(mesh.shape[part] for part in parts if part == "tensor")
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = (math.prod(leaf.shape) // n_parts, "fsdp" in parts)
    return found


def training(config: TrainConfig, mesh, tpu: bool) -> Bytes:
    """Bytes of a training step. `tpu`: as the TPU compiler writes it, else as XLA's CPU compiler.

    The TPU compiler sums the gradients from several products of one input before reducing them over
    tensor. With micro-batches, the CPU compiler reuses the tied table gathered for the lookup in
    the loss (after jax 0.10.2). TPUs use the loss of gpt/training/fused_loss.py.
    """
    c = config.model
    item, kept = ITEM_BYTES[c.compute_dtype or "float32"], ITEM_BYTES[c.param_dtype]
    n_micro_batches = config.grad_accum
    fsdp = mesh.shape["fsdp"]
    weights = matrices(c, mesh)
    rows = Bytes(mesh.shape)

    # Over data, gradients move once, summed over all micro-batches, or once per micro-batch.
    platform = "tpu" if tpu else "cpu"
    reduces_once = step_functions.reduces_over_data_once(config, mesh.shape, platform)
    data, batch = ("data",), BATCH
    if reduces_once:
        data, batch = (), ("fsdp",)
        n_entries = sum(n // fsdp if is_split else n for n, is_split in weights.values())
        rows.move("reduce", ("data",), n_entries * kept)

    # Blocks: matrices are gathered for use, and again for the backward pass if blocks are
    # recomputed; their gradients are scattered.
    n_gathers = n_micro_batches * (2 if config.remat == "blocks" else 1)
    for name, (entries, is_split) in weights.items():
        if name.startswith("blocks/") and is_split:
            rows.move("gather", ("fsdp",), n_gathers * entries * item)
            rows.move("reduce", ("fsdp",), n_micro_batches * entries * item)
            rows.move("reduce", data, n_micro_batches * entries / fsdp * item)
        elif name.startswith(("blocks/", "final_norm")):
            rows.move("reduce", batch, n_micro_batches * entries * item)

    # Lookup: the embedding is gathered in its storage dtype; its gradient is summed whole. If it is
    # computed separately for each part of data, the tokens' gradients, in float32, and their ids
    # are gathered instead.
    for name in ("tokens", "positions"):
        entries, is_split = weights.get(name, (0, False))
        if is_split:
            rows.move("gather", ("fsdp",), entries * kept)
        if name == "tokens" and is_split and reduces_once:
            n_rows = config.batch_size // mesh.shape["data"]
            rows.move("gather", ("fsdp",), n_rows * config.sequence_length * 4 * (c.d_model + 1))
        else:
            rows.move("reduce", batch, n_micro_batches * entries * kept)

    # Loss: the table is gathered in the compute dtype.
    entries, is_split = weights["tokens" if c.tied else "head"]
    if is_split:
        n_of_table = 1 if tpu else count_table_gathers(config)
        rows.move("gather", ("fsdp",), n_of_table * n_micro_batches * entries * item)
        rows.move("reduce", ("fsdp",), n_micro_batches * entries * kept)
        loss_item = ITEM_BYTES["float32"] if tpu else item
        rows.move("reduce", data, n_micro_batches * entries / fsdp * loss_item)

    if mesh.shape["tensor"] > 1:
        add_tensor_parallelism(rows, config, item, kept, tpu)
    return rows


def count_table_gathers(config: TrainConfig) -> int:
    """Gathers of the loss's table per micro-batch in a CPU program: two if the backward pass
    recomputes the logits."""
    c = config.model
    if c.tied and config.grad_accum > 1 and jax.__version_info__ > (0, 10, 2):
        return 0
    n_tokens = config.batch_size // config.grad_accum * config.sequence_length  # on all devices
    return 2 if n_tokens * c.padded_vocab > KEPT_LOGITS else 1


def add_tensor_parallelism(
    rows: Bytes, config: TrainConfig, item: int, kept: int, tpu: bool
) -> None:
    """Sums over tensor: two per block in each direction (Shoeybi et al. 2019, Megatron-LM, section
    3), one more if the block is recomputed; the lookup; and the loss, whose softmax needs four
    numbers per token and vocabulary chunk, or three per token on a TPU."""
    c, n_micro_batches = config.model, config.grad_accum
    n_rows = config.batch_size // n_micro_batches // (rows.mesh["data"] * rows.mesh["fsdp"])
    n_tokens = n_rows * config.sequence_length
    stream = n_tokens * c.d_model  # entries of the residual stream on one device
    backward = 2
    if not tpu:
        backward = 5 if c.gated_mlp else 4
    n_sums = 2 + backward + (1 if config.remat == "blocks" else 0)
    rows.move("reduce", ("tensor",), n_micro_batches * c.n_layers * n_sums * stream * item)
    rows.move("reduce", ("tensor",), n_micro_batches * stream * kept)
    if tpu:
        loss = stream * item + 3 * n_tokens * 4
    else:
        n_chunks = count_chunks(c.padded_vocab)
        loss = n_chunks * (stream * item + 4 * n_tokens * 4)
    rows.move("reduce", ("tensor",), n_micro_batches * loss)


def decoding(config: ModelConfig, mesh, n_rows: int, n_tokens: int) -> Bytes:
    """Bytes for reading `n_tokens` tokens in each of `n_rows` rows: two sums per block, the lookup,
    and one position's logits per row, which every device gets for its rows. Weights and cache stay
    put if the cache's heads divide evenly among the devices."""
    rows = Bytes(mesh.shape)
    n_rows_here = n_rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    item = ITEM_BYTES[config.compute_dtype or "float32"]
    stream = n_rows_here * n_tokens * config.d_model
    rows.move("reduce", ("tensor",), 2 * config.n_layers * stream * item)
    rows.move("reduce", ("tensor",), stream * ITEM_BYTES[config.for_sampling().param_dtype])
    rows.move("gather", ("tensor",), n_rows_here * config.padded_vocab * 4)
    return rows
