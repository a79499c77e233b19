"""Seconds from the start of the process to a validation loss, beside nanoGPT on the same text.

    python benchmarks/time_to_loss.py --data tinyshakespeare.txt --nanogpt FOLDER

Both split the same characters 9 to 1 and train 0.8 M weights on 12 sequences of 64. Ours evaluates
the whole validation split; nanoGPT, run by the command of its README for CPUs, 20 random batches of
it. FOLDER is nanoGPT's, in which its data/shakespeare_char/prepare.py has run. The runs take turns.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
OURS = (
    *("--optimizer", "muon", "--steps", "500", "--warmup-steps", "50"),
    *("--eval-every", "50", "--sample-every", "0", "--save-every", "500"),
)
THEIRS = (
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4"),
    *("--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)


@dataclass(frozen=True)
class Command:
    """What to run."""

    data: Path
    """The text: tinyshakespeare.txt."""
    nanogpt: Path | None = None
    """nanoGPT's folder, its data prepared; without it ours runs alone."""
    python: Path = ROOT / ".venv-parity" / "bin" / "python"
    """The interpreter that has torch."""
    target: float = 1.8857
    """Loss in nats a character; nanoGPT reported this one at the end."""
    repeats: int = 3
    """Runs of each."""


def ours(command: Command, folder: str) -> float:
    """Seconds until an evaluation of ours is at the target."""
    out = Path(folder) / "run"
    words = ["train.py", "shakespeare-char", "--data", str(command.data.absolute())]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words, "--out", str(out), *OURS], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            time.sleep(0.05)
            path = out / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            losses = [json.loads(line).get("val_loss") for line in lines if line.endswith("}")]
            if any(loss is not None and loss <= command.target for loss in losses):
                return time.perf_counter() - begun
    finally:
        process.kill()
        process.wait()
    raise SystemExit(f"error: our run ended above {command.target}")


def theirs(command: Command, folder: str) -> tuple[float, float]:
    """Seconds of nanoGPT's run up to its last evaluation, and the loss that it found."""
    words = [str(command.python), "train.py", *THEIRS, f"--out_dir={folder}"]
    begun, seconds, loss = time.perf_counter(), 0.0, 0.0
    with subprocess.Popen(
        words, cwd=command.nanogpt, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        for line in process.stdout:
            if found := re.match(r"step \d+: train loss .* val loss ([\d.]+)", line):
                seconds, loss = time.perf_counter() - begun, float(found[1])
    if process.returncode or not seconds:
        raise SystemExit(f"error: nanoGPT left with {process.returncode}, its last loss {loss}")
    return seconds, loss


def main() -> None:
    """Run them in turn; a line each, then the medians and the ratio of neighbouring turns."""
    command = tyro.cli(Command, description=__doc__)
    mine, others = [], []
    for _ in range(command.repeats):
        with tempfile.TemporaryDirectory() as folder:
            mine.append(ours(command, folder))
        print(f"ours     {mine[-1]:.1f} s to {command.target}", flush=True)
        if command.nanogpt:
            with tempfile.TemporaryDirectory() as folder:
                others.append(theirs(command, folder))
            print(f"nanoGPT  {others[-1][0]:.1f} s to {others[-1][1]}", flush=True)
    print(f"ours, median {statistics.median(mine):.1f} s")
    if others:
        ratios = [their[0] / my for their, my in zip(others, mine, strict=True)]
        print(f"nanoGPT's whole run takes {statistics.median(ratios):.2f} times as long ({ratios})")


if __name__ == "__main__":
    main()
