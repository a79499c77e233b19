"""What a compiled program sends between devices.

The TPU compiler hides communication behind matrix products, in two ways that must not be counted
as they are written:
- It cuts one collective into pieces that are fused with the products around it. All pieces have the
  channel of the one they come from.
- It turns a product with a gathered operand, or one whose sum is scattered, into a loop over the
  parts (a windowed product, Wang et al. 2023), which passes them round by collective-permutes.
  The loop counts as the all-gather or the reduce-scatter that it stands for.
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
FUSED_SCATTER = "all-reduce-scatter"  # the TPU compiler's name of a fused computation

# The spellings of the groups of devices among which a collective goes.
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
STRIDED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
PERMUTED_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


@dataclass(frozen=True)
class Collective:
    """A collective of one instruction, by its name. `n_bytes`: the whole array on one device, after
    it is gathered or before it is scattered. `axes`: the mesh axes over which it goes; `group`: the
    first of the groups of devices that take part. `n_runs`: how often it runs in one call of the
    program."""

    name: str
    kind: str
    n_bytes: int
    axes: tuple[str, ...]
    group: tuple[int, ...]
    n_runs: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave a device per call, by ring algorithms (Chan et al. 2007, section 4)."""
        if self.kind == "collective-permute":
            return self.n_runs * self.n_bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        size = len(self.group)
        return self.n_runs * rounds * self.n_bytes * (size - 1) / size


def find(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a program. `mesh`: the sizes of its axes, by name."""
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
                n_bytes = one.n_bytes  # may be of another type than the terms
            places = np.unravel_index(group, list(mesh.values()))
            axes = tuple(
                name for name, place in zip(mesh, places, strict=True) if np.ptp(place) > 0
            )
            found.append(Collective(one.name, kind, n_bytes, axes, tuple(group), n_runs))
    return found


def kind_of(one: Instruction, computation: str) -> str | None:
    """The collective that an instruction of a computation stands for, or None."""
    kind = one.opcode.removesuffix("-start")  # its -done is not of KINDS
    if kind not in KINDS:
        return None
    if windowed := WINDOWED.search(computation):
        return WINDOWED_KINDS[windowed[1]]
    if kind == "all-reduce" and computation.startswith(FUSED_SCATTER):
        return "reduce-scatter"
    return kind


def first_group(line: str, n_devices: int) -> list[int]:
    """Devices of the first group of a collective, in any of XLA's spellings."""
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

    # Axes of a mesh, as in 'a'=8,'b'=2 and 'a'. Or a part of one, 'a':(2)4: the 4 devices on it
    # that come after it is split into 2.
    group, stride = [0], n_devices
    for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1]):
        stride //= int(size)
        for before, part in re.findall(rf"'{axis}'(?::\((\d+)\)(\d+))?", named[2]):
            length = int(part or size)
            step = stride * int(size) // (int(before or 1) * length)
            group = [device + i * step for device in group for i in range(length)]
    return sorted(group)
