"""What a compiled program sends between devices.

The TPU compiler overlaps communication with matrix products in two ways that must not be counted
literally:
- It splits a collective into pieces fused with the surrounding products. All pieces keep the
  channel of the original.
- It turns a product with a gathered operand or a scattered sum into a loop over the parts (a
  windowed product, Wang et al. 2023), which circulate by collective-permutes. The loop counts as
  the all-gather or reduce-scatter it replaces.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gpt.plan.program_text import WINDOWED, Instruction, Program, integers

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
CHANNEL = re.compile(r"channel_id=(\d+)")
WINDOWED_KINDS = {"ag": "all-gather", "rs": "reduce-scatter"}
FUSED_SCATTER = "all-reduce-scatter"  # the TPU compiler's name for a fused computation

# The notations for a collective's groups of devices.
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
STRIDED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
PERMUTED_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


@dataclass(frozen=True)
class Collective:
    """The collective of the instruction `name`. `n_bytes`: the whole array on one device, after a
    gather or before a scatter. `axes`: the mesh axes it spans; `group`: the first of its groups of
    devices. `n_runs`: runs per call of the program."""

    name: str
    kind: str
    n_bytes: int
    axes: tuple[str, ...]
    group: tuple[int, ...]
    n_runs: int

    @property
    def sent_bytes(self) -> float:
        """Bytes sent by a device per call, with ring algorithms (Chan et al. 2007, section 4)."""
        if self.kind == "collective-permute":
            return self.n_runs * self.n_bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        size = len(self.group)
        return self.n_runs * rounds * self.n_bytes * (size - 1) / size


def find(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """A program's collectives. `mesh`: axis sizes by name."""
    found = []
    counted = set()
    for computation, n_runs in program.n_runs.items():
        for one in program.computations[computation]:
            kind = kind_of(one, computation)
            if kind is None:
                continue

            # The permutes of a windowed product count once, and so do pieces of one collective.
            is_windowed = WINDOWED.search(computation) is not None
            channel = CHANNEL.search(one.line)
            origin = one.name
            if is_windowed:
                origin = computation
            elif channel and computation in program.fused:
                origin = channel[1]
            if origin in counted:
                continue
            counted.add(origin)

            group = first_group(one.line, math.prod(mesh.values()))
            n_bytes = sum(program.instructions[name].n_bytes for name in one.operands)
            if is_windowed or kind == "all-gather":
                n_bytes *= len(group)
            elif one.opcode == "all-reduce":
                n_bytes = one.n_bytes  # its dtype may differ from the operands'
            places = np.unravel_index(group, list(mesh.values()))
            axes = tuple(
                name for name, place in zip(mesh, places, strict=True) if np.ptp(place) > 0
            )
            found.append(Collective(one.name, kind, n_bytes, axes, tuple(group), n_runs))
    return found


def kind_of(one: Instruction, computation: str) -> str | None:
    """The collective that an instruction of a computation stands for, or None."""
    kind = one.opcode.removesuffix("-start")  # the matching -done is not in KINDS
    if kind not in KINDS:
        return None
    if windowed := WINDOWED.search(computation):
        return WINDOWED_KINDS[windowed[1]]
    if kind == "all-reduce" and computation.startswith(FUSED_SCATTER):
        return "reduce-scatter"
    return kind


def first_group(line: str, n_devices: int) -> list[int]:
    """Devices in a collective's first group, in any of XLA's notations."""
    if strided := STRIDED_GROUPS.search(line):
        groups, sizes, order = (integers(part or "") for part in strided.groups())
        ids = np.arange(n_devices).reshape(sizes)
        return ids.transpose(order or None).reshape(groups)[0].tolist()
    if listed := LISTED_GROUPS.search(line):
        return integers(listed[1])
    if permuted := PERMUTED_PAIRS.search(line):
        targets = dict(integers(pair) for pair in permuted[1].strip("{}").split("},{"))
        ring = [next(iter(targets))]
        while (target := targets.get(ring[-1], ring[0])) not in ring:
            ring.append(target)
        return ring
    named = NAMED_GROUPS.search(line)
    if named is None:
        return list(range(n_devices))

    # Mesh axes, as in 'a'=8,'b'=2 and 'a'. Or part of an axis: 'a':(2)4 is its factor of 4 after
    # a first factor of 2.
    group, stride = [0], n_devices
    for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1]):
        stride //= int(size)
        for before, part in re.findall(rf"'{axis}'(?::\((\d+)\)(\d+))?", named[2]):
            length = int(part or size)
            step = stride * int(size) // (int(before or 1) * length)
            group = [device + i * step for device in group for i in range(length)]
    return sorted(group)
