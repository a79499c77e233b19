"""Side by side with what people would use instead: same shapes, same threads, one machine.

    make bench-peers NANOGPT=PATH
    python benchmarks/peers.py --nanogpt PATH --rows "decode gpt2 1" "train nano"

Each contestant is a process of its own (benchmarks/workers/) that has loaded and warmed up and
waits. They take turns, one at work at a time; a ratio is of two neighbouring turns, and the median
of these ratios counts, with the middle half of them. Writes benchmarks/results/peers.json and
prints the table. Weights are random: the work does not depend on them. llama.cpp reads them from
files that are written here first and removed at the end.
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
# OpenMP's threads (torch, llama.cpp) spin for a moment when they wait, as their users have it. If
# they sleep (OMP_WAIT_POLICY=passive), llama.cpp takes twice as long to decode on idle cores. When
# they spin beside other work it takes many times as long: measure on a machine without any.
PLACE = {**os.environ, "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Row:
    """A line of the table: the work, and who does it beside us. `unit`: what one second is of."""

    name: str
    work: tuple[str, ...]
    peers: tuple[str, ...]
    unit: str = "ms"


STEP = "ms a step"
TORCH = ("transformers",)
NANO = ("nanogpt-eager", "nanogpt-compiled")
LLAMA_CPP, LLAMA_CPP_8 = ("llama.cpp f32",), ("llama.cpp q8_0",)  # and how its weights are written
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
    Row("decode llama int8 1", ("decode", "llama", "1", "128", "32", "int8"), LLAMA_CPP_8, STEP),
]


@dataclass(frozen=True)
class Command:
    """What to compare."""

    python: Path = ROOT / ".venv-parity" / "bin" / "python"
    """The interpreter that has torch and transformers, and llama_cpp if its lines are wanted."""
    nanogpt: Path | None = None
    """nanoGPT's folder (its model.py is used); without it its rows are left out."""
    rows: tuple[str, ...] = ()
    """Lines of the table by name (default: all)."""
    repeats: int = 7
    """Turns of each contestant."""
    out: Path = Path(__file__).parent / "results" / "peers.json"
    """Where the result goes; lines measured before stay."""


class Contestant:
    """A process that does the work once for each line that it is sent."""

    def __init__(self, python: Path, script: str, *words: str):
        command = [str(python), str(WORKERS / script), *words]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=PLACE)
        self.expect("ready")

    def expect(self, word: str) -> float:
        """The number that follows `word` in the next line of the process."""
        line = self.process.stdout.readline().split()
        if not line or line[0] != word:
            raise SystemExit(f"error: {' '.join(self.process.args)} ended before its time")
        return float(line[1])

    def turn(self) -> float:
        """Seconds of one more turn."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.expect("seconds")

    def end(self) -> float:
        """Let it go; the most memory that it has taken, in bytes."""
        self.process.stdin.close()
        peak = self.expect("peak")
        self.process.stdout.close()
        self.process.wait()
        return peak


def start(peer: str, row: Row, command: Command, scratch: Path) -> Contestant:
    """A contestant by name; files that it needs go into the folder `scratch`."""
    if peer == "ours":
        return Contestant(Path(sys.executable), "ours.py", *row.work)
    if peer == "transformers":
        return Contestant(command.python, "with_transformers.py", *row.work)
    if peer.startswith("llama.cpp"):
        file = write_weights(command.python, row.work[1], peer.split()[1], scratch)
        return Contestant(command.python, "with_llama_cpp.py", str(file), *row.work)
    folder, mode = str(command.nanogpt), peer.removeprefix("nanogpt-")
    return Contestant(command.python, "with_nanogpt.py", folder, mode, *row.work)


def write_weights(python: Path, name: str, kind: str, scratch: Path) -> Path:
    """The file of a model's weights that llama.cpp reads, written if it is not there yet."""
    path = scratch / f"{name}-{kind}.gguf"
    if not path.exists():
        writer = str(ROOT / "benchmarks" / "gguf_writer.py")
        subprocess.run([python, writer, name, kind, path], check=True, env=PLACE)
    return path


@functools.cache
def has_llama_cpp(python: Path) -> bool:
    """Whether this interpreter can run llama.cpp and write its files."""
    tried = subprocess.run([python, "-c", "import gguf, llama_cpp"], capture_output=True)
    return tried.returncode == 0


def missing(row: Row, command: Command) -> str:
    """What a line needs and has not; nothing if it can be measured."""
    if row.peers == NANO and command.nanogpt is None:
        return "nanoGPT's folder (NANOGPT=PATH, --nanogpt PATH)"
    if row.peers[0].startswith("llama.cpp") and not has_llama_cpp(command.python):
        return f"llama-cpp-python and gguf in {command.python}; a C++ compiler builds the former"
    return ""


def choose(command: Command) -> list[Row]:
    """The lines asked for, but for those that cannot be measured here: one line says why."""
    unknown = set(command.rows) - {row.name for row in ROWS}
    if unknown:
        raise SystemExit(f"error: no line named {unknown}: choose of {[row.name for row in ROWS]}")
    rows = [row for row in ROWS if not command.rows or row.name in command.rows]
    needs = {row: missing(row, command) for row in rows}
    for need in sorted(set(needs.values()) - {""}):
        names = ", ".join(row.name for row in rows if needs[row] == need)
        print(f"left out: {names}; needed: {need}", file=sys.stderr)
    return [row for row in rows if not needs[row]]


def middle(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4)


def measure(row: Row, command: Command, scratch: Path) -> list[dict]:
    """One result for each peer: when and where, medians of both, quartiles of the ratio, peak
    memory of both."""
    results = []
    for peer in row.peers:
        with contextlib.ExitStack() as stack:
            both = [start(name, row, command, scratch) for name in ("ours", peer)]
            for one in both:
                stack.callback(one.process.kill)
            turns = [[one.turn() for one in both] for _ in range(command.repeats)]
            peaks = [one.end() for one in both]
        ours, theirs = zip(*turns, strict=True)
        ratios = [b / a for a, b in turns]
        results.append(
            {"row": row.name, "peer": peer, "unit": row.unit, "repeats": command.repeats}
            | {"date": datetime.date.today().isoformat(), "python": platform.python_version()}
            | {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
            | {"ours": statistics.median(ours), "theirs": statistics.median(theirs)}
            | {"ratio": middle(ratios), "our_peak_bytes": peaks[0], "their_peak_bytes": peaks[1]}
        )
        print(table([results[-1]]).splitlines()[-1], flush=True)
    return results


def table(results: list[dict]) -> str:
    """The results as Markdown."""
    lines = ["| work | peer | ours, ms | theirs, ms | theirs / ours (quartiles) | peak GB |"]
    lines += ["|---|---|---|---|---|---|"]
    for r in results:
        low, ratio, high = r["ratio"]
        lines.append(
            f"| {r['row']} | {r['peer']} | {r['ours'] * 1e3:,.2f} | {r['theirs'] * 1e3:,.2f} | "
            f"**{ratio:.2f}** ({low:.2f} to {high:.2f}) | "
            f"{r['our_peak_bytes'] / 1e9:.2f} / {r['their_peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the lines asked for and keep the others."""
    command = tyro.cli(Command, description=__doc__)
    kept = json.loads(command.out.read_text())["results"] if command.out.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        for row in choose(command):
            new = measure(row, command, Path(scratch))
            kept = [old for old in kept if old["row"] != row.name] + new
            command.out.parent.mkdir(exist_ok=True)
            command.out.write_text(json.dumps({"results": kept}, indent=1) + "\n")
    print(table(kept))


if __name__ == "__main__":
    main()
