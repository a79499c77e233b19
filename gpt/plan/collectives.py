"""What a compiled program sends between devices: each collective, how often, how many bytes.

Reads XLA's text of a compiled program and nothing else. A collective in the body of a loop counts
once for each turn: loops are what layers and micro-batches are.

The TPU compiler hides communication behind products in two ways that a plain reader would count
wrongly. It cuts one collective into pieces that are fused with the products around it: all pieces
bear the channel of the one. And it turns a product with a gathered operand, or one whose sum is
scattered, into a loop over the parts (a windowed product, Wang et al. 2023), which passes them
round by collective-permutes: read here as the all-gather or the reduce-scatter that it stands for.
Parts that do not fill its tiles it may gather by a sum: each device's part in an array of zeros.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
WIDTHS |= {"s4": 1, "u4": 1, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(calls|body|condition|branch_computations)=\{?((?:%[\w.-]+(?:, (?=%))?)+)")
TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
CHANNEL = re.compile(r"channel_id=(\d+)")
LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
PARTS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")
STANDS_FOR = {"ag": "all-gather", "rs": "reduce-scatter"}
PIECE = re.compile(r" dynamic-update-slice\(%broadcast")  # a part in an array of zeros
SUMMED_GATHER = "all-gather by all-reduce"
FUSED_SCATTER = "all-reduce-scatter"  # how a TPU's program names the computation that it fuses


@dataclass(frozen=True)
class Collective:
    """One instruction. `n_bytes`: the whole array, before it is scattered or after it is gathered,
    on one device; `axes`: the mesh axes over which it goes, of `group` devices in all; `turns`:
    times that it runs in a step."""

    kind: str
    n_bytes: int
    axes: tuple[str, ...]
    group: int
    turns: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave a device in a step, by ring algorithms (Chan et al. 2007, section 4)."""
        rounds = 2 if self.kind.endswith("all-reduce") else 1
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.turns * rounds * share * self.n_bytes


def size_of(shape: str) -> int:
    """Bytes of an array, or of a tuple of them, as XLA writes its type."""
    total = 0
    for kind, sizes in ARRAY.findall(shape):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += WIDTHS.get(kind, 0) * count
    return total


def split_computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry computation, and the lines of each computation."""
    found: dict[str, list[str]] = defaultdict(list)
    entry = current = ""
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            current = start.group(2)
            entry = current if start.group(1) else entry
        elif line.startswith(" "):
            found[current].append(line)
    return entry, found


def called(line: str) -> dict[str, list[str]]:
    """The computations that an instruction calls, by the role that they play."""
    names: dict[str, list[str]] = defaultdict(list)
    for role, listed in CALLED.findall(line):
        names[role] += [name.strip().lstrip("%") for name in listed.split(",")]
    return names


def count_turns(line: str, condition: list[str]) -> int:
    """Turns of a loop: as the compiler knows them, else the constant that it counts up to."""
    if known := TURNS.search(line):
        return int(known.group(1))
    return max((int(n) for text in condition for n in CONSTANT.findall(text)), default=1)


def integers(listed: str) -> list[int]:
    """`2,4` as [2, 4]."""
    return [int(word) for word in listed.split(",") if word]


def first_group(line: str, n_devices: int) -> list[int]:
    """Devices of one of the groups of a collective, in any of XLA's spellings."""
    if found := COUNTED.search(line):
        groups, sizes, order = (integers(part or "") for part in found.groups())
        ids = np.arange(n_devices).reshape(sizes)
        return ids.transpose(order or None).reshape(groups)[0].tolist()
    if found := NAMED.search(line):
        return named_group(*found.groups())
    if found := PAIRS.search(line):
        pairs = dict(integers(pair) for pair in found.group(1).strip("{}").split("},{"))
        ring = [next(iter(pairs))]
        while (following := pairs.get(ring[-1], ring[0])) not in ring:
            ring.append(following)
        return ring
    listed = LISTED.search(line)
    return integers(listed.group(1)) if listed else list(range(n_devices))


def named_group(sizes: str, over: str) -> list[int]:
    """The first group over axes of a mesh: `'a'=8,'b'=2` and `'a'`, or `'a':(2)4` for a part of a,
    4 devices of it after the first 2."""
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    ids = np.arange(np.prod(list(shape.values()))).reshape(list(shape.values()))
    names, group = list(shape), {0}
    for name, before, size in PARTS.findall(over):
        axis, whole = names.index(name), shape[name]
        step = whole // (int(before) * int(size)) if size else 1
        stride = ids.strides[axis] // ids.itemsize * step
        group = {g + i * stride for g in group for i in range(int(size or whole))}
    return sorted(int(g) for g in group)


@dataclass
class Reader:
    """Walks the computations of a program of a mesh and keeps the collectives that it meets."""

    computations: dict[str, list[str]]
    mesh: Mapping[str, int]
    sizes: dict[str, int] = field(default_factory=dict)
    pieces: set[str] = field(default_factory=set)
    found: list[Collective] = field(default_factory=list)
    channels: set[str] = field(default_factory=set)

    def __post_init__(self):
        lines = (line for lines in self.computations.values() for line in lines)
        matches = [match for line in lines if (match := INSTRUCTION.match(line))]
        self.sizes = {match.group(1): size_of(match.group(2)) for match in matches}
        self.pieces = {match.group(1) for match in matches if PIECE.search(match.group(0))}

    def walk(self, name: str, turns: int, fused: bool = False) -> None:
        """Note the collectives of a computation that runs `turns` times, and of what it calls."""
        windowed = WINDOWED.search(name)
        for line in self.computations[name]:
            if not (match := INSTRUCTION.match(line)):
                continue
            opcode = match.group(3)
            if opcode.endswith(("-done", "-update")):
                continue  # the end of what a start has been counted for
            if windowed and opcode.startswith("collective-permute"):
                continue  # a part of what the loop stands for
            if opcode.removesuffix("-start") in KINDS and not (fused and self.is_piece(line)):
                scatter = name.startswith(FUSED_SCATTER) and opcode == "all-reduce"
                self.note(match, line, turns, "reduce-scatter" if scatter else None)
            self.follow(line, opcode, turns)

    def is_piece(self, line: str) -> bool:
        """Whether a fused collective is a further piece of one that has been counted."""
        channel = CHANNEL.search(line)
        again = channel is not None and channel.group(1) in self.channels
        self.channels |= {channel.group(1)} if channel else set()
        return again

    def follow(self, line: str, opcode: str, turns: int) -> None:
        """Walk what an instruction calls."""
        names = called(line)
        if opcode == "while":
            (body,) = names["body"]
            if windowed := WINDOWED.search(body):
                self.note_windowed(body, STANDS_FOR[windowed.group(1)], turns)
            condition = [text for c in names.pop("condition") for text in self.computations[c]]
            turns *= count_turns(line, condition)
        for callee in (one for listed in names.values() for one in listed):
            self.walk(callee, turns, fused=opcode == "fusion")

    def note(self, match: re.Match, line: str, turns: int, kind: str | None = None) -> None:
        """Keep one collective."""
        _, shape, opcode, rest = match.groups()
        kind, n_bytes = kind or opcode.removesuffix("-start"), size_of(shape)
        operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
        if kind == "all-reduce" and operands and self.pieces.issuperset(operands):
            kind = SUMMED_GATHER
        elif kind == "reduce-scatter" or opcode.endswith("-start"):  # their operands
            before = sum(self.sizes.get(operand, 0) for operand in operands)
            n_bytes = n_bytes - before if kind == "all-gather" else before or n_bytes
        self.keep(kind, n_bytes, line, turns)

    def keep(self, kind: str, n_bytes: int, line: str, turns: int) -> None:
        """Keep a collective among the devices that `line` names."""
        sizes = list(self.mesh.values())
        group = first_group(line, int(np.prod(sizes)))
        places = np.array(np.unravel_index(group, sizes))
        axes = zip(self.mesh, places, strict=True)
        over = tuple(name for name, place in axes if len(set(place.tolist())) > 1)
        self.found.append(Collective(kind, n_bytes, over, len(group), turns))

    def note_windowed(self, body: str, kind: str, turns: int) -> None:
        """Keep what a windowed product's loop stands for: its parts, one from each of the ring."""
        permutes = (line for line in self.computations[body] if " collective-permute" in line)
        line = next(permutes)
        part = INSTRUCTION.match(line).group(4)
        (operand,) = re.findall(r"%([\w.-]+)", part.split(")")[0])
        ring = len(first_group(line, 0))
        self.keep(kind, ring * self.sizes[operand], line, turns)


def find(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    `text`: what `compiled.as_text()` returns. `mesh`: the sizes of its axes, by name.
    """
    entry, computations = split_computations(text)
    reader = Reader(computations, mesh)
    reader.walk(entry, 1)
    return reader.found
