"""The kernels of a program compiled for a GPU: what each moves and computes, and how long it takes
at the chip's data-sheet rates.

A kernel takes as long as the slowest of memory, arithmetic, links and launch, and no two overlap.
There are two estimates: one at the full data-sheet rates, and a longer one at the shares of them
that a real card has reached.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from gpt.plan.collectives import Collective
from gpt.plan.devices import Chip
from gpt.plan.program_text import Instruction, Program, integers, shapes_in

LAUNCH_SECONDS = 2e-6

# Shares of the data-sheet rates that gpt2's kernels reached on an H200, by kind, over their total
# time (benchmarks/gpu_kernels.py; docs/speed.md). Attention is cuDNN's, with heads of width 64.
REACHED_PRODUCTS = 0.74
REACHED_ATTENTION = 0.22
REACHED_MEMORY = 0.6

NO_KERNELS = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")
NO_KERNELS += ("conditional", "call", "after-all", "partition-id", "replica-id", "opt-barrier")
READ_IN_PART = ("gather", "dynamic-slice", "slice")
WRITTEN_IN_PART = {"dynamic-update-slice": 1, "scatter": -1}  # index of the written operand
FRAME = re.compile(r"stack_frame_id=(\d+)")
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions": ?\[)([\d,"]+)')
SCORES = re.compile(r'"intermediate_tensor_shape".*?"dimensions": ?\[([\d, "]+)\]')


@dataclass
class Kernel:
    """A kernel, or all of one kind. Figures are totals over all runs: `seconds` at the data-sheet
    rates, `likely_seconds` at the shares of them that a card has reached.

    `line`: its source line in this project, such as `gpt/model/layers.py:91`; empty if unknown.
    """

    name: str
    line: str
    runs: int = 0
    moved_bytes: float = 0
    flops: float = 0
    seconds: float = 0
    likely_seconds: float = 0


def find(
    program: Program, chip: Chip, mesh: Mesh, collectives: Sequence[Collective] = ()
) -> list[Kernel]:
    """The kernels, `collectives` included, of a program compiled for a mesh of these chips."""
    link_seconds = {}
    for one in collectives:
        rate = link_rate(chip, [mesh.devices.flat[i].process_index for i in one.group])
        link_seconds[one.name] = one.sent_bytes / one.n_runs / rate
    found = []
    for computation, n_runs in program.n_runs.items():
        if computation in program.fused:
            continue
        for one in program.computations[computation]:
            if one.opcode in NO_KERNELS or one.opcode.endswith("-done"):
                continue
            n_bytes = moved_bytes(program, one)
            flops, flops_in_bf16 = count_flops(program, one)
            memory = n_bytes / chip.bytes_per_second
            arithmetic = flops_in_bf16 / chip.flops_per_second
            others = max(link_seconds.get(one.name, 0), LAUNCH_SECONDS)
            reached = REACHED_ATTENTION if SCORES.search(one.line) else REACHED_PRODUCTS
            frame = FRAME.search(one.line)
            source = program.lines_of_frames.get(frame[1], "") if frame else ""
            kernel = Kernel(one.name, source, n_runs)
            kernel.moved_bytes = n_runs * n_bytes
            kernel.flops = n_runs * flops
            kernel.seconds = n_runs * max(memory, arithmetic, others)
            kernel.likely_seconds = n_runs * max(
                memory / REACHED_MEMORY, arithmetic / reached, others
            )
            found.append(kernel)
    return found


def link_rate(chip: Chip, nodes: Sequence[int]) -> float:
    """Bytes/s that each GPU of a group sends to the next. `nodes`: each GPU's node.

    A ring leaves a node over the network cards of all its GPUs in the group.
    """
    n_of_a_node = max(Counter(nodes).values())
    if n_of_a_node == len(nodes):
        return chip.link_bytes_per_second
    return min(chip.link_bytes_per_second, n_of_a_node * chip.network_bytes_per_second)


def longest(kernels: Sequence[Kernel], n: int) -> list[Kernel]:
    """The `n` slowest kinds of kernel, with totals. Kernels of one kind share a source line and a
    name, apart from its number."""
    kinds: dict[tuple[str, str], Kernel] = {}
    for one in kernels:
        name = one.name.split(".")[0]
        kind = kinds.setdefault((name, one.line), Kernel(name, one.line))
        kind.runs += one.runs
        kind.moved_bytes += one.moved_bytes
        kind.flops += one.flops
        kind.seconds += one.seconds
        kind.likely_seconds += one.likely_seconds
    return sorted(kinds.values(), key=lambda kind: -kind.seconds)[:n]


def moved_bytes(program: Program, kernel: Instruction) -> int:
    """Bytes that a kernel reads and writes.

    Lookups count only the rows read, in-place updates only the rows written.
    """
    body = [kernel]
    given = [program.instructions[name] for name in kernel.operands]
    if kernel.opcode == "fusion":
        body = program.computations[kernel.callees[0]]
        given = [one for one in body if one.opcode == "parameter"]
    views = {one.name: one.operands[0] for one in body if one.opcode == "bitcast"}

    def origin(name: str) -> str:
        return origin(views[name]) if name in views else name

    # Bytes read of each array, over all instructions that use it.
    read = dict.fromkeys((array.name for array in given), 0)
    for user in body:
        for place, name in enumerate(user.operands):
            array = origin(name)
            if array in read and user.opcode != "bitcast":
                read[array] += read_bytes(program.instructions[array], user, place)
    total = sum(min(read[array.name], array.n_bytes) for array in given)

    # Bytes written of each result.
    root = next((one for one in body if one.is_root), kernel)
    for name in root.operands if root.opcode == "tuple" else [root.name]:
        result = program.instructions[origin(name)]
        if result.name in read:
            continue  # passed through
        written = WRITTEN_IN_PART.get(result.opcode)
        if written and origin(result.operands[0]) in read:
            result = program.instructions[result.operands[written]]
        total += result.n_bytes
    return total


def read_bytes(array: Instruction, user: Instruction, place: int) -> int:
    """Bytes of `array` that `user` reads as its operand number `place`."""
    if place == 0 and user.opcode in READ_IN_PART:
        return user.n_bytes
    if place == 0 and user.opcode in WRITTEN_IN_PART:
        return 0
    return array.n_bytes


def count_flops(program: Program, one: Instruction) -> tuple[float, float]:
    """A kernel's matrix-product FLOPs, and the number of bfloat16 FLOPs that take the same time.

    On the data sheets, operands of twice the bytes take twice as long; float32 operands are
    multiplied as TF32.
    """
    inside = [inner for callee in one.callees for inner in program.computations[callee]]
    flops = flops_in_bf16 = 0.0
    for inner in inside:
        more, more_in_bf16 = count_flops(program, inner)
        flops += more
        flops_in_bf16 += more_in_bf16
    contracted = CONTRACTED.search(one.line)
    scores = SCORES.search(one.line)
    if one.opcode not in ("dot", "custom-call") or not (contracted or scores):
        return flops, flops_in_bf16

    sizes, item = shapes_in(program.instructions[one.operands[0]].shape)[0]
    if scores:
        # cuDNN attention: two products of this many scores, five in the backward pass.
        n_products = 5 if "Backward" in one.line else 2
        visible = 0.5 if '"CAUSAL"' in one.line else 1
        entries = n_products * visible * math.prod(integers(re.sub('[ "]', "", scores[1])))
        depth = sizes[-1]
    else:
        entries = math.prod(shapes_in(one.shape)[0][0])
        depth = math.prod(sizes[axis] for axis in integers(contracted[1].replace('"', "")))
    n = 2 * entries * depth
    return flops + n, flops_in_bf16 + n * item / 2
