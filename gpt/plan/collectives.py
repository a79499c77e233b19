"""What a compiled program sends between devices, read from the text that XLA prints of it.

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
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|body|branch_computations)=\{?((?:%[\w.-]+(?:, (?=%))?)+)")
CONDITION = re.compile(r"condition=%([\w.-]+)")
TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
NAME = re.compile(r"%([\w.-]+)")
CHANNEL = re.compile(r"channel_id=(\d+)")
WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")
WINDOWED_KINDS = {"ag": "all-gather", "rs": "reduce-scatter"}
FUSED_SCATTER = "all-reduce-scatter"  # the TPU compiler's name of a fused computation

# The spellings of the groups of devices among which a collective goes.
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
STRIDED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
PERMUTED_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


@dataclass(frozen=True)
class Collective:
    """A collective of one instruction. `n_bytes`: the whole array on one device, after it is
    gathered or before it is scattered. `axes`: the mesh axes over which it goes, `group_size`
    devices in all. `n_runs`: how often it runs in one call of the program."""

    kind: str
    n_bytes: int
    axes: tuple[str, ...]
    group_size: int
    n_runs: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave a device per call, by ring algorithms (Chan et al. 2007, section 4)."""
        if self.kind == "collective-permute":
            return self.n_runs * self.n_bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.n_runs * rounds * self.n_bytes * (self.group_size - 1) / self.group_size


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `callees`: the computations that it runs."""

    opcode: str
    result_bytes: int
    operand_bytes: int
    callees: list[str]
    line: str


Computations = Mapping[str, list[Instruction]]


def find(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program.

    `text`: what `compiled.as_text()` returns. `mesh`: the sizes of its axes, by name.
    """
    computations, fused, entry = parse(text)
    n_runs_of: Counter[str] = Counter()
    count_runs(computations, entry, 1, n_runs_of)

    found, counted = [], set()
    for computation, n_runs in n_runs_of.items():
        is_windowed = WINDOWED.search(computation) is not None
        for one in computations[computation]:
            kind = kind_of(one, computation)
            if kind is None:
                continue

            # The permutes of a windowed product count once, and so do pieces of one collective.
            origin, channel = one.line, CHANNEL.search(one.line)
            if is_windowed:
                origin = computation
            elif channel and computation in fused:
                origin = channel[1]
            if origin in counted:
                continue
            counted.add(origin)

            group = first_group(one.line, math.prod(mesh.values()))
            n_bytes = one.operand_bytes
            if is_windowed or kind == "all-gather":
                n_bytes *= len(group)
            elif one.opcode == "all-reduce":
                n_bytes = one.result_bytes  # may be of another type than the terms
            found.append(Collective(kind, n_bytes, axes_of(group, mesh), len(group), n_runs))
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


def parse(text: str) -> tuple[Computations, set[str], str]:
    """The instructions of each computation of a program, the names of the fused computations, and
    the name of the one that the program starts with."""
    entry = current = ""
    computations: dict[str, list[Instruction]] = defaultdict(list)
    fused: set[str] = set()
    n_bytes: dict[str, int] = {}
    for line in text.splitlines():
        start, match = COMPUTATION.match(line), INSTRUCTION.match(line)
        if start:
            current = start[2]
            entry = current if start[1] else entry
        elif match:
            name, shape, opcode, rest = match.groups()
            arrays = ARRAY.findall(shape)  # several in a tuple
            n_bytes[name] = sum(
                math.prod(integers(sizes)) * int(bits or 8) // 8 for _, bits, sizes in arrays
            )
            operand_bytes = sum(n_bytes.get(one, 0) for one in NAME.findall(rest.split(")")[0]))
            callees = NAME.findall(" ".join(CALLED.findall(line)))
            if opcode == "fusion":
                fused.update(callees)
            computations[current].append(
                Instruction(opcode, n_bytes[name], operand_bytes, callees, line)
            )
    return computations, fused, entry


def count_runs(computations: Computations, name: str, n_runs: int, n_runs_of: Counter[str]) -> None:
    """Count `n_runs` more runs of a computation and of all that it calls.

    A loop runs its body as often as the compiler knows, else as the constant says to which it
    counts up. That of a windowed product stands for one collective.
    """
    n_runs_of[name] += n_runs
    for one in computations[name]:
        n_calls = n_runs
        known = TRIP_COUNT.search(one.line)
        if one.opcode == "while" and not WINDOWED.search(one.callees[0]):
            condition = computations[CONDITION.search(one.line)[1]]
            limits = CONSTANT.findall("\n".join(test.line for test in condition))
            n_calls *= int(known[1]) if known else max(map(int, limits), default=1)
        for callee in one.callees:
            count_runs(computations, callee, n_calls, n_runs_of)


def axes_of(devices: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh on which these devices are at different places."""
    places = np.unravel_index(devices, list(mesh.values()))
    return tuple(name for name, place in zip(mesh, places, strict=True) if np.ptp(place) > 0)


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


def integers(listed: str) -> list[int]:
    """`2,4` as [2, 4]."""
    return [int(word) for word in listed.split(",") if word]
