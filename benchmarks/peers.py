"""Compare this project with its alternatives, with the same shapes, threads and machine.

    make bench-peers NANOGPT=PATH
    python benchmarks/peers.py --nanogpt PATH --rows "decode gpt2 1" "train nano"

Each contestant is a separate process (benchmarks/workers/) that loads its model, warms up and
waits. They take turns, so only one works at a time. Each ratio compares two neighbouring turns; the
result is the median ratio with its quartiles, written to benchmarks/results/peers.json and printed
as a table. Weights are random, since the work does not depend on them. llama.cpp reads them from
files that are written first and deleted at the end.
"""

import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
WORKERS = Path(__file__).parent / "workers"
# OpenMP threads (torch, llama.cpp) spin briefly while waiting, by default. If they slept instead
# (OMP_WAIT_POLICY=passive), llama.cpp would take twice as long to decode on idle cores. Spinning
# while other work runs makes it many times slower, so measure on an idle machine.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Row:
    """A row of the table: the arguments of the workers, the peers, and the unit of the times."""

    name: str
    work: tuple[str, ...]
    peers: tuple[str, ...]
    unit: str


STEP = "ms a step"
TORCH = ("transformers",)
NANO = ("nanogpt-eager", "nanogpt-compiled")
LLAMA_CPP = ("llama.cpp f32",)  # with the weights' dtype
LLAMA_CPP_INT8 = ("llama.cpp q8_0",)
ROWS = [
    Row("train nano", ("train", "shakespeare-char", "12"), NANO, STEP),
    Row("train gpt2", ("train", "gpt2", "2"), NANO, STEP),
    Row("decode gpt2 1", ("decode", "gpt2", "1", "128", "32"), TORCH, STEP),
    Row("decode gpt2 8", ("decode", "gpt2", "8", "128", "32"), TORCH, STEP),
    Row("decode gpt2 32", ("decode", "gpt2", "32", "128", "32"), TORCH, STEP),
    Row("prefill gpt2 1", ("prefill", "gpt2", "1", "128"), TORCH, "ms"),
    Row("prefill gpt2 8", ("prefill", "gpt2", "8", "128"), TORCH, "ms"),
    Row("prefill llama 128", ("prefill", "llama", "1", "128"), LLAMA_CPP, "ms"),
    Row("prefill llama 512", ("prefill", "llama", "1", "512"), LLAMA_CPP, "ms"),
    Row("decode llama 1", ("decode", "llama", "1", "128", "32"), LLAMA_CPP, STEP),
    Row("decode llama int8 1", ("decode", "llama", "1", "128", "32", "int8"), LLAMA_CPP_INT8, STEP),
]


@dataclass(frozen=True)
class Command:
    """What to compare."""

    python: Path = ROOT / ".venv-parity" / "bin" / "python"
    """Interpreter with torch and transformers, and llama_cpp for the rows that need it."""
    nanogpt: Path | None = None
    """nanoGPT's folder, for its model.py; without it, its rows are skipped."""
    rows: tuple[str, ...] = ()
    """Table rows by name (default: all)."""
    repeats: int = 7
    """Turns per contestant."""
    out: Path = Path(__file__).parent / "results" / "peers.json"
    """File for the results; earlier rows are kept."""


class Contestant:
    """A process that does the work once per line sent to it."""

    def __init__(self, python: Path, script: str, *words: str):
        self.process = subprocess.Popen(
            [str(python), str(WORKERS / script), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        self.expect("ready")

    def expect(self, word: str) -> float:
        """The number after `word` in the process's next line."""
        line = self.process.stdout.readline().split()
        if not line or line[0] != word:
            raise SystemExit(f"error: {' '.join(self.process.args)} ended early")
        return float(line[1])

    def take_turn(self) -> float:
        """Do the work once more; return its seconds."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.expect("seconds")

    def end(self) -> float:
        """End the process; return its peak memory in bytes."""
        self.process.stdin.close()
        peak_bytes = self.expect("peak")
        self.process.stdout.close()
        self.process.wait()
        return peak_bytes


def start(peer: str, row: Row, command: Command, scratch: Path) -> Contestant:
    """Start a contestant by name, writing any files it needs to the folder `scratch`."""
    if peer == "ours":
        return Contestant(Path(sys.executable), "ours.py", *row.work)
    if peer == "transformers":
        return Contestant(command.python, "with_transformers.py", *row.work)
    if peer.startswith("llama.cpp"):
        file = write_weights(command.python, row.work[1], peer.split()[1], scratch)
        return Contestant(command.python, "with_llama_cpp.py", str(file), *row.work)
    mode = peer.removeprefix("nanogpt-")
    return Contestant(command.python, "with_nanogpt.py", str(command.nanogpt), mode, *row.work)


def write_weights(python: Path, name: str, kind: str, scratch: Path) -> Path:
    """The model's weights as a file for llama.cpp, written if missing."""
    path = scratch / f"{name}-{kind}.gguf"
    if not path.exists():
        writer = str(ROOT / "benchmarks" / "gguf_writer.py")
        subprocess.run([python, writer, name, kind, path], check=True, env=ENVIRONMENT)
    return path


@functools.cache
def has_llama_cpp(python: Path) -> bool:
    """Whether this interpreter can run llama.cpp and write its files."""
    tried = subprocess.run([python, "-c", "import gguf, llama_cpp"], capture_output=True)
    return tried.returncode == 0


def missing(row: Row, command: Command) -> str | None:
    """What a row needs that is not here, or None if it can be measured."""
    if row.peers == NANO and command.nanogpt is None:
        return "nanoGPT's folder (NANOGPT=PATH, --nanogpt PATH)"
    if row.peers[0].startswith("llama.cpp") and not has_llama_cpp(command.python):
        return f"llama-cpp-python and gguf in {command.python}; a C++ compiler builds the former"
    return None


def choose_rows(command: Command) -> list[Row]:
    """The requested rows that can be measured here; prints the others with the reason."""
    names = [row.name for row in ROWS]
    unknown = set(command.rows) - set(names)
    if unknown:
        raise SystemExit(f"error: no row named {', '.join(unknown)}: choose from {names}")
    chosen: list[Row] = []
    left_out: dict[str, list[str]] = {}
    for row in ROWS:
        if command.rows and row.name not in command.rows:
            continue
        need = missing(row, command)
        if need is None:
            chosen.append(row)
        else:
            left_out.setdefault(need, []).append(row.name)
    for need, left in sorted(left_out.items()):
        print(f"left out: {', '.join(left)}; needed: {need}", file=sys.stderr)
    return chosen


def measure(row: Row, peer: str, command: Command, scratch: Path) -> dict:
    """Take turns with one peer: medians of both, quartiles of the ratio, peak memory of both."""
    with contextlib.ExitStack() as stack:
        ours = start("ours", row, command, scratch)
        stack.callback(ours.process.kill)
        theirs = start(peer, row, command, scratch)
        stack.callback(theirs.process.kill)
        turns = [(ours.take_turn(), theirs.take_turn()) for _ in range(command.repeats)]
        our_peak_bytes = ours.end()
        their_peak_bytes = theirs.end()
    ratios = [their_seconds / our_seconds for our_seconds, their_seconds in turns]
    return {
        "row": row.name,
        "peer": peer,
        "unit": row.unit,
        "repeats": command.repeats,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "ours": statistics.median(seconds for seconds, _ in turns),
        "theirs": statistics.median(seconds for _, seconds in turns),
        "ratio": statistics.quantiles(ratios, n=4),
        "our_peak_bytes": our_peak_bytes,
        "their_peak_bytes": their_peak_bytes,
    }


HEAD = "| work | peer | ours, ms | theirs, ms | theirs / ours (quartiles) | peak GB |"


def table(results: list[dict]) -> str:
    """The results as Markdown."""
    return "\n".join([HEAD, "|---|---|---|---|---|---|", *map(table_row, results)])


def table_row(result: dict) -> str:
    low, ratio, high = result["ratio"]
    cells = [
        result["row"],
        result["peer"],
        f"{result['ours'] * 1e3:,.2f}",
        f"{result['theirs'] * 1e3:,.2f}",
        f"**{ratio:.2f}** ({low:.2f} to {high:.2f})",
        f"{result['our_peak_bytes'] / 1e9:.2f} / {result['their_peak_bytes'] / 1e9:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure the requested rows, and keep the results of the others."""
    command = tyro.cli(Command, description=__doc__)
    results = []
    if command.out.exists():
        results = json.loads(command.out.read_text())["results"]
    with tempfile.TemporaryDirectory() as scratch:
        for row in choose_rows(command):
            results = [old for old in results if old["row"] != row.name]
            for peer in row.peers:
                results.append(measure(row, peer, command, Path(scratch)))
                print(table_row(results[-1]), flush=True)
            command.out.parent.mkdir(exist_ok=True)
            command.out.write_text(json.dumps({"results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
