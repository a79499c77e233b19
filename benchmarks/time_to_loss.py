"""Seconds from process start to a given validation loss, compared with nanoGPT.

    python benchmarks/time_to_loss.py --data tinyshakespeare.txt --nanogpt FOLDER

Both split the same characters 9 to 1 and train 0.8 M weights on 12 sequences of 64. Ours evaluates
the whole validation split; nanoGPT, run with its README's CPU command, 20 random batches of it.
FOLDER is a checkout of nanoGPT in which data/shakespeare_char/prepare.py has been run. The runs
take turns.
"""

import json
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
OURS = ["--optimizer", "muon", "--steps", "500", "--warmup-steps", "50"]
OURS += ["--eval-every", "50", "--sample-every", "0", "--save-every", "500"]
THEIRS = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"]
THEIRS += ["--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4"]
THEIRS += ["--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"]


@dataclass(frozen=True)
class Command:
    """What to run."""

    data: Path
    """The text: tinyshakespeare.txt."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT with its data prepared; without it, only ours runs."""
    python: Path = ROOT / ".venv-parity" / "bin" / "python"
    """Interpreter with torch."""
    target: float = 1.8857
    """Loss in nats per character; the default is nanoGPT's final loss."""
    repeats: int = 3
    """Runs of each."""


def ours(command: Command, folder: str) -> float:
    """Seconds until an evaluation of our run reaches the target."""
    out = Path(folder) / "run"
    words = ["train.py", "shakespeare-char", "--data", str(command.data.absolute())]
    words += ["--out", str(out), *OURS]
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            time.sleep(0.05)
            if reached(command.target, out / "metrics.jsonl"):
                return time.perf_counter() - begun
    finally:
        process.kill()
        process.wait()
    raise SystemExit(f"error: our run ended above {command.target}")


def reached(target: float, metrics: Path) -> bool:
    """Whether an evaluation in this file reached the target; its last line may be incomplete."""
    if not metrics.exists():
        return False
    lines = metrics.read_text().splitlines()
    losses = [json.loads(line).get("val_loss") for line in lines if line.endswith("}")]
    return any(loss is not None and loss <= target for loss in losses)


def theirs(command: Command, folder: str) -> tuple[float, float]:
    """Seconds until the last evaluation of nanoGPT's run, and its loss."""
    words = [str(command.python), "train.py", *THEIRS, f"--out_dir={folder}"]
    begun = time.perf_counter()
    seconds = loss = 0.0
    with subprocess.Popen(words, cwd=command.nanogpt, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            found = re.match(r"step \d+: train loss .* val loss ([\d.]+)", line)
            if found:
                seconds = time.perf_counter() - begun
                loss = float(found[1])
    if process.returncode or not seconds:
        raise SystemExit(f"error: nanoGPT exited with {process.returncode}, its last loss {loss}")
    return seconds, loss


def main() -> None:
    """Print a line per run, then the medians and the ratio of neighbouring turns."""
    command = tyro.cli(Command, description=__doc__)
    our_seconds: list[float] = []
    ratios: list[float] = []
    for _ in range(command.repeats):
        with tempfile.TemporaryDirectory() as folder:
            our_seconds.append(ours(command, folder))
        print(f"ours     {our_seconds[-1]:.1f} s to {command.target}", flush=True)
        if command.nanogpt:
            with tempfile.TemporaryDirectory() as folder:
                seconds, loss = theirs(command, folder)
            ratios.append(seconds / our_seconds[-1])
            print(f"nanoGPT  {seconds:.1f} s to {loss}", flush=True)

    print(f"ours, median {statistics.median(our_seconds):.1f} s")
    if ratios:
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"nanoGPT's run takes {statistics.median(ratios):.2f} times as long ({listed})")


if __name__ == "__main__":
    main()
