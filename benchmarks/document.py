"""Write docs/benchmark.md: cards, tables and rooflines of two models on this machine.

    python benchmarks/document.py runs/tiny

Runs `python -m gpt.bench` once per section and quotes its output. Adds the table of
benchmarks/peers.py if it has been measured.
"""

import datetime
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent))

import peers

ROOT = Path(__file__).parent.parent
HEAD = """# Benchmark

Made by `python benchmarks/document.py RUN` on {date}: {machine}, Python {python}. The card
says what each column means; `python -m gpt.bench --formulas` prints how FLOPs and bytes are
counted. Prefill and decode are separate everywhere: decode's tokens per second never include
reading the prompt.
"""


@dataclass(frozen=True)
class Command:
    """What to measure."""

    checkpoint: tyro.conf.Positional[Path]
    """Run folder of the demo."""
    repeats: int = 7
    """Repeats per cell."""


def bench(title: str, words: list[str], repeats: int, plot: str | None = None) -> str:
    """A section: the command, its output without the last line, and its plot."""
    command = [*words, "--repeats", str(repeats)]
    if plot:
        command += ["--plot", f"docs/{plot}"]
    run = [sys.executable, "-m", "gpt.bench", *command]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT)
    said = done.stdout.rstrip("\n").rsplit("\n", 1)[0]
    said = "\n".join(line.rstrip() for line in said.splitlines())
    picture = f"\n![{title} under the measured roofline]({plot})\n" if plot else ""
    shown = " ".join(word if " " not in word else repr(word) for word in command)
    return f"## {title}\n\n`python -m gpt.bench {shown}`\n\n```\n{said}\n```\n{picture}"


def peers_section() -> str:
    """The table of peers, if there is one."""
    path = Path(__file__).parent / "results" / "peers.json"
    if not path.exists():
        return ""
    results = json.loads(path.read_text())["results"]
    known = {f"{r['machine']}, {r['date']}, Python {r['python']}" for r in results}
    command = f"`make bench-peers NANOGPT=FOLDER` ({'; '.join(sorted(known))})"
    return f"## Compared with what people use\n\n{command}\n\n{peers.table(results)}\n"


def main() -> None:
    """Measure, and write the page."""
    command = tyro.cli(Command, description=__doc__)
    run, n = str(command.checkpoint), command.repeats
    gpt2 = ["--preset", "gpt2", "--batch-sizes", "1,8", "--prompt-lengths", "128,512"]
    about = {"date": datetime.date.today(), "python": platform.python_version()}
    parts = [
        HEAD.format(machine=platform.processor() or platform.machine(), **about),
        bench("The demo's model", [run, "--batch-sizes", "1,8,32"], n, "roofline-tiny.svg"),
        bench("gpt2 (124 M, random weights)", gpt2, max(n // 2, 2), "roofline-gpt2.svg"),
        bench("Training the demo's preset", ["--train", "--preset", "tiny"], n),
        peers_section(),
    ]
    (ROOT / "docs" / "benchmark.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
