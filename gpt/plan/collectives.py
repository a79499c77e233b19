"""What a compiled program sends between devices: each collective, how often, how many bytes.

This reads the text that XLA prints of a compiled program and nothing else. A collective in the body
of a loop counts once per iteration: layers and micro-batches are loops.

The TPU compiler hides communication behind matrix products in ways that a plain reader would count
wrongly:
- It cuts one collective into pieces that are fused with the products around it. All pieces have the
  channel of the one they come from.
- It turns a product with a gathered operand, or one whose sum is scattered, into a loop over the
  parts (a windowed product, Wang et al. 2023), which passes them round by collective-permutes.
  These are read as the all-gather or the reduce-scatter that the loop stands for.
- It may gather parts that do not fill its tiles by a sum, each device's part in an array of zeros.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SUMMED_GATHER = "all-gather by all-reduce"
FUSED_SCATTER = "all-reduce-scatter"  # the TPU compiler's name of a computation that it fuses
ITEM_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2}
ITEM_BYTES |= {"f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "f64": 8}

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(calls|body|condition|branch_computations)=\{?((?:%[\w.-]+(?:, (?=%))?)+)")
TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
CHANNEL = re.compile(r"channel_id=(\d+)")
WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")
WINDOWED_KINDS = {"ag": "all-gather", "rs": "reduce-scatter"}

# The spellings of the groups of devices among which a collective goes.
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
STRIDED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
NAMED_PARTS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
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
        rounds = 2 if self.kind.endswith("all-reduce") else 1
        return self.n_runs * rounds * self.n_bytes * (self.group_size - 1) / self.group_size


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `n_bytes`: of its result."""

    name: str
    opcode: str
    n_bytes: int
    operands: list[str]
    line: str


def find(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    `text`: what `compiled.as_text()` returns. `mesh`: the sizes of its axes, by name.
    """
    entry = current = ""
    computations: dict[str, list[Instruction]] = defaultdict(list)
    for line in text.splitlines():
        start, match = COMPUTATION.match(line), INSTRUCTION.match(line)
        if start:
            current = start[2]
            entry = current if start[1] else entry
        elif match:
            name, shape, opcode, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            instruction = Instruction(name, opcode, array_bytes(shape), operands, line)
            computations[current].append(instruction)
    reader = Reader(computations, mesh)
    reader.read(entry, 1)
    return reader.found


def array_bytes(shape: str) -> int:
    """Bytes of an array, or of a tuple of them, as XLA writes its type."""
    total = 0
    for dtype, sizes in ARRAY.findall(shape):
        total += ITEM_BYTES.get(dtype, 0) * math.prod(integers(sizes))
    return total


def integers(listed: str) -> list[int]:
    """`2,4` as [2, 4]."""
    return [int(word) for word in listed.split(",") if word]


@dataclass
class Reader:
    """Follows the calls between the computations of a program and keeps its collectives."""

    computations: dict[str, list[Instruction]]
    mesh: Mapping[str, int]
    found: list[Collective] = field(default_factory=list)

    def __post_init__(self):
        every = [one for instructions in self.computations.values() for one in instructions]
        self.n_bytes = {one.name: one.n_bytes for one in every}
        # Arrays of zeros but for the part of one device.
        self.padded_parts = {
            one.name
            for one in every
            if one.opcode == "dynamic-update-slice" and one.operands[0].startswith("broadcast")
        }
        self.fused_channels: set[str] = set()

    def read(self, name: str, n_runs: int, in_fusion: bool = False) -> None:
        """Keep the collectives of a computation that runs `n_runs` times, and of what it calls."""
        windowed = WINDOWED.search(name)
        for one in self.computations[name]:
            kind = one.opcode.removesuffix("-start")
            if one.opcode.endswith(("-done", "-update")):
                continue  # its start has been counted
            if windowed and kind.startswith("collective-permute"):
                continue  # the loop has been kept as the collective that it stands for
            if kind in KINDS and not (in_fusion and self.is_further_piece(one)):
                if name.startswith(FUSED_SCATTER) and kind == "all-reduce":
                    kind = "reduce-scatter"
                elif kind == "all-reduce" and self.adds_padded_parts(one):
                    kind = SUMMED_GATHER
                self.keep(kind, self.whole_bytes(kind, one), one.line, n_runs)
            self.read_callees(one, n_runs)

    def read_callees(self, one: Instruction, n_runs: int) -> None:
        """Read what an instruction calls."""
        callees = {}
        for role, listed in CALLED.findall(one.line):
            callees[role] = [name.strip().lstrip("%") for name in listed.split(",")]
        if one.opcode == "while":
            (body,) = callees["body"]
            condition = callees.pop("condition")[0]
            if windowed := WINDOWED.search(body):
                self.keep_windowed(body, WINDOWED_KINDS[windowed[1]], n_runs)
            n_runs *= self.trip_count(one, condition)
        for names in callees.values():
            for name in names:
                self.read(name, n_runs, in_fusion=one.opcode == "fusion")

    def trip_count(self, loop: Instruction, condition: str) -> int:
        """Iterations of a loop: as the compiler knows them, else the constant it counts up to."""
        if known := TRIP_COUNT.search(loop.line):
            return int(known[1])
        lines = "\n".join(one.line for one in self.computations[condition])
        return max((int(n) for n in CONSTANT.findall(lines)), default=1)

    def is_further_piece(self, one: Instruction) -> bool:
        """Whether a fused collective is a further piece of one that has been counted."""
        channel = CHANNEL.search(one.line)
        if channel is None:
            return False
        if channel[1] in self.fused_channels:
            return True
        self.fused_channels.add(channel[1])
        return False

    def adds_padded_parts(self, one: Instruction) -> bool:
        """Whether a reduction adds arrays that are zero but for the part of one device."""
        return bool(one.operands) and self.padded_parts.issuperset(one.operands)

    def whole_bytes(self, kind: str, one: Instruction) -> int:
        """Bytes of the array after a gather or before a reduction."""
        operand_bytes = sum(self.n_bytes.get(name, 0) for name in one.operands)
        is_start = one.opcode.endswith("-start")
        if kind == "all-gather" and is_start:
            return one.n_bytes - operand_bytes  # its type lists the operands too
        if kind == "reduce-scatter" or (is_start and kind != SUMMED_GATHER):
            return operand_bytes or one.n_bytes
        return one.n_bytes

    def keep_windowed(self, body: str, kind: str, n_runs: int) -> None:
        """Keep what the loop of a windowed product stands for: one part from each of the ring."""
        permutes = (one for one in self.computations[body] if "collective-permute" in one.opcode)
        first = next(permutes)
        ring = first_group(first.line, 0)
        self.keep(kind, len(ring) * self.n_bytes[first.operands[0]], first.line, n_runs)

    def keep(self, kind: str, n_bytes: int, line: str, n_runs: int) -> None:
        """Keep a collective among the devices that `line` names."""
        sizes = list(self.mesh.values())
        group = first_group(line, math.prod(sizes))
        places = np.unravel_index(group, sizes)  # of each axis, where the devices are on it
        axes = [name for name, place in zip(self.mesh, places, strict=True) if np.ptp(place) > 0]
        self.found.append(Collective(kind, n_bytes, tuple(axes), len(group), n_runs))


def first_group(line: str, n_devices: int) -> list[int]:
    """Devices of the first group of a collective, in any of XLA's spellings."""
    if strided := STRIDED_GROUPS.search(line):
        groups, sizes, order = (integers(part or "") for part in strided.groups())
        ids = np.arange(n_devices).reshape(sizes)
        return ids.transpose(order or None).reshape(groups)[0].tolist()
    if named := NAMED_GROUPS.search(line):
        return named_group(*named.groups())
    if permuted := PERMUTED_PAIRS.search(line):
        targets = dict(integers(pair) for pair in permuted[1].strip("{}").split("},{"))
        ring = [next(iter(targets))]
        while (target := targets.get(ring[-1], ring[0])) not in ring:
            ring.append(target)
        return ring
    if listed := LISTED_GROUPS.search(line):
        return integers(listed[1])
    return list(range(n_devices))


def named_group(mesh: str, over: str) -> list[int]:
    """The first group over axes of a mesh: `'a'=8,'b'=2` and `'a'`, or `'a':(2)4` for a part of a,
    the 4 devices on it that come after the first split into 2."""
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    names, sizes = list(shape), list(shape.values())
    group = [0]
    for name, before, size in NAMED_PARTS.findall(over):
        stride = math.prod(sizes[names.index(name) + 1 :])
        length = shape[name]
        if size:
            length = int(size)
            stride *= shape[name] // (int(before) * length)
        group = [device + i * stride for device in group for i in range(length)]
    return sorted(group)
