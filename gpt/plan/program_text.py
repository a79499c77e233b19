"""A compiled program, parsed from the text that XLA prints."""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|body|\w+_computations?)=\{?((?:%[\w.-]+(?:, (?=%))?)+)")
CONDITION = re.compile(r"condition=%([\w.-]+)")
TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")  # see collectives.py
NAME = re.compile(r"%([\w.-]+)")

# Tables at the top of the text that give the Python line of each instruction.
TABLE = re.compile(r"^(FileNames|FileLocations|StackFrames)\n((?:\d+ .+\n)+)", re.MULTILINE)
FILE_NAME = re.compile(r'(\d+) "(.*)"')
FILE_LOCATION = re.compile(r"(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
STACK_FRAME = re.compile(r"(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")


def shapes_in(text: str) -> list[tuple[list[int], int]]:
    """The sizes and bytes per entry of each array in a shape; a tuple has several.

    Types smaller than a byte count as one byte.
    """
    found = []
    for _, bits, sizes in ARRAY.findall(text):
        found.append((integers(sizes), max(int(bits or 8) // 8, 1)))
    return found


def integers(listed: str) -> list[int]:
    """`2,4` as [2, 4]."""
    return [int(word) for word in listed.split(",") if word]


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shape`: its result's, as XLA writes it. `callees`: the
    computations it runs, except loop conditions and reducers."""

    name: str
    opcode: str
    shape: str
    operands: list[str]
    callees: list[str]
    is_root: bool
    line: str

    @cached_property
    def n_bytes(self) -> int:
        return sum(math.prod(sizes) * item for sizes, item in shapes_in(self.shape))


@dataclass
class Program:
    """The instructions by computation, and by name. `fused`: computations inside a kernel.
    `n_runs`: each computation's runs per call of the program, counting all branches of a
    conditional, and one turn of a loop of unknown length."""

    computations: dict[str, list[Instruction]]
    instructions: dict[str, Instruction]
    fused: set[str]
    lines_of_frames: dict[str, str]
    n_runs: Counter[str] = field(default_factory=Counter)

    def count_runs(self, computation: str, n_runs: int) -> None:
        """Count `n_runs` more runs of a computation and everything it calls."""
        self.n_runs[computation] += n_runs
        for one in self.computations[computation]:
            n_turns = 1
            if one.opcode == "while":
                n_turns = self.count_turns(one) or 1
            for callee in one.callees:
                self.count_runs(callee, n_runs * n_turns)

    def count_turns(self, loop: Instruction) -> int | None:
        """How often a loop runs its body: the trip count known to the compiler, else the constant
        in its condition; None if it depends on data. The loop of a windowed product counts as one
        turn."""
        if WINDOWED.search(loop.callees[0]):
            return 1
        if known := TRIP_COUNT.search(loop.line):
            return int(known[1])
        condition = self.computations[CONDITION.search(loop.line)[1]]
        limits = CONSTANT.findall("\n".join(one.line for one in condition))
        is_compound = any(one.opcode in ("and", "or", "reduce", "call") for one in condition)
        return int(limits[0]) if len(limits) == 1 and not is_compound else None

    def of_kind(self, opcode: str) -> list[Instruction]:
        """All instructions with this operation."""
        return [one for one in self.instructions.values() if one.opcode == opcode]


def read(text: str) -> Program:
    """Parse the text that `compiled.as_text()` returns."""
    entry = current = ""
    computations: dict[str, list[Instruction]] = defaultdict(list)
    instructions: dict[str, Instruction] = {}
    fused: set[str] = set()
    for line in text.splitlines():
        start = COMPUTATION.match(line)
        match = INSTRUCTION.match(line)
        if start:
            current = start[2]
            if start[1]:
                entry = current
        elif match:
            root, name, shape, opcode, rest = match.groups()
            operands = NAME.findall(rest.split(")")[0])
            callees = NAME.findall(" ".join(CALLED.findall(line)))
            if opcode == "fusion":
                fused.update(callees)
            one = Instruction(name, opcode, shape, operands, callees, root is not None, line)
            instructions[name] = one
            computations[current].append(one)
    program = Program(computations, instructions, fused, lines_of_frames(text))
    program.count_runs(entry, 1)
    return program


def lines_of_frames(text: str) -> dict[str, str]:
    """The innermost line of this project in each stack frame, by frame number."""
    tables = dict(TABLE.findall(text))
    files = dict(FILE_NAME.findall(tables.get("FileNames", "")))
    places = {}
    for location, file, line in FILE_LOCATION.findall(tables.get("FileLocations", "")):
        path = Path(files[file])
        if path.is_relative_to(PACKAGE):
            places[location] = f"{path.relative_to(PACKAGE.parent)}:{line}"
    found: dict[str, str] = {}
    for frame, location, parent in STACK_FRAME.findall(tables.get("StackFrames", "")):
        found[frame] = places.get(location) or found.get(parent, "")
    return found
