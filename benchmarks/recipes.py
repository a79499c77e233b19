"""What each ingredient of a recipe contributes, at the token budget of nanoGPT's CPU recipe.

    python benchmarks/recipes.py --data tinyshakespeare.txt --out docs/recipes.md

Every row trains about 0.8 M weights for 2,000 steps of 12 x 64 characters and reports the loss over
the whole validation split. Each row adds an ingredient to the row above; the first and last rows
are means over several seeds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
ADDED = [
    (
        "nanoGPT's recipe: AdamW, cosine, learned positions, weights from N(0, 0.02²)",
        ["--model.init-std", "0.02"],
    ),
    ("weights from N(0, 0.06²)", ["--model.init-std", "0.06"]),
    ("Muon for the blocks' matrices", ["--optimizer", "muon", "--muon-learning-rate", "0.02"]),
    ("RoPE", ["--model.positions", "rope"]),
    ("RMSNorm, QK-norm", ["--model.norm", "rms", "--model.qk-norm"]),
    ("SwiGLU of the same size", ["--model.mlp", "swiglu", "--model.d-ff", "340"]),
    (
        "WSD, falling to zero over half of the steps",
        ["--schedule", "wsd", "--decay-fraction", "0.5", "--min-learning-rate", "0"],
    ),
]
MARK = "<!-- made by benchmarks/recipes.py -->"


@dataclass(frozen=True)
class Command:
    """What to train on, and where to write the table."""

    data: Path
    """tinyshakespeare.txt, or another text."""
    out: Path
    """Markdown file to write the table to."""
    seeds: int = 3
    """Seeds for the first and last rows."""


def train(data: Path, flags: list[str], seed: int) -> tuple[float, float]:
    """Train once; return the validation loss in nats, and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", "shakespeare-char", "--data", data]
        command += ["--out", folder, "--seed", str(seed), "--sample-every", "0"]
        command += ["--eval-every", "100000", "--save-every", "100000", *flags]
        subprocess.run(command, check=True, capture_output=True)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    seconds = max(record.get("seconds", 0) for record in records)
    return records[-1]["val_loss"], seconds


def measure(data: Path, name: str, flags: list[str], seeds: int) -> str:
    """Train and format one row of the table."""
    results = [train(data, flags, seed) for seed in range(seeds)]
    losses = [loss for loss, _ in results]
    loss = f"{statistics.mean(losses):.4f}"
    if seeds > 1:
        loss += f" ({', '.join(f'{one:.4f}' for one in losses)})"
    seconds = statistics.median(seconds for _, seconds in results)
    return f"| {name} | {loss} | {seconds:.0f} |"


def main() -> None:
    """Train every row and write the table."""
    command = tyro.cli(Command, description=__doc__)
    rows = ["| recipe | validation loss, nats | seconds |", "|---|---|---|"]
    flags: list[str] = []
    for i, (name, added) in enumerate(ADDED):
        flags += added
        is_end = i in (0, len(ADDED) - 1)
        title = name if i == 0 else f"+ {name}"
        rows.append(measure(command.data, title, flags, command.seeds if is_end else 1))
        print(rows[-1], flush=True)

    # The table replaces whatever follows the mark.
    text = MARK
    if command.out.exists():
        text = command.out.read_text(encoding="utf-8")
    before, _, _ = text.partition(MARK)
    table = "\n".join(rows)
    command.out.write_text(f"{before}{MARK}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
