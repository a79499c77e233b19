"""What each part of the Transformer is for: the tiny preset, trained without it.

    python benchmarks/ablations.py --out docs/how-it-works.md --steps 200

Every row trains the same number of steps on the same batches of Python's standard library and
reports the loss on held-out text. What is a setting of the model is a flag; what is none, because
nobody should want it, is patched here, in the process that trains that row.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
MARK = "<!-- made by benchmarks/ablations.py -->"
DIVERGED = 77  # the exit code after too many steps that are no number
EVERY = ["--log-every", "50", "--sample-every", "0", "--keep-best", "0"]
EVERY += ["--eval-every", "1000000", "--save-every", "1000000"]


def share_queries_and_keys() -> None:
    """A token asks for what it offers: scores become symmetric but for the turn of RoPE."""
    from gpt.model.attention import Attention

    project = Attention.project

    def shared(self, x_BTD):
        q_BTNH, _, v_BTKH = project(self, x_BTD)
        return q_BTNH, q_BTNH, v_BTKH

    Attention.project = shared


def leave_scores_unscaled() -> None:
    """Queries times sqrt(H), which the scores are divided by later."""
    from gpt.model.attention import Attention

    project = Attention.project

    def unscaled(self, x_BTD):
        q_BTNH, k_BTKH, v_BTKH = project(self, x_BTD)
        return q_BTNH * q_BTNH.shape[-1] ** 0.5, k_BTKH, v_BTKH

    Attention.project = unscaled


def leave_out_residuals() -> None:
    """Each sublayer's output instead of the sum with its input."""
    from gpt.model import transformer

    class Bare(transformer.Block):
        def __call__(self, x_BTD, past, key_B, positions, attend):
            drop = self.weights_drop(key_B)
            x_BTD, past = self.attention(self.attention_norm(x_BTD), past, positions, attend, drop)
            return self.mlp(self.mlp_norm(x_BTD)), past

    transformer.BLOCKS["pre"] = Bare


def leave_out_mask() -> None:
    """Every token sees the whole window, the one that it has to predict among them."""
    import jax.numpy as jnp

    from gpt.model import attention, flash_attention

    flash_attention.KERNELS.clear()  # which have masks of their own
    attention.visible = lambda pos_BT, n_queries, n_slots: jnp.ones((1, n_queries, n_slots), bool)


@dataclass(frozen=True)
class Variant:
    """A row of the table: what is said of it, the flags, what is patched."""

    name: str
    flags: tuple[str, ...] = ()
    patch: Callable[[], None] | None = None


WHOLE = Variant("the tiny preset: four heads, RoPE, pre-norm")
NO_MASK = Variant("no mask", patch=leave_out_mask)
VARIANTS = (
    WHOLE,
    Variant("queries and keys from one projection", patch=share_queries_and_keys),
    Variant("one head of width 128 instead of four of 32", ("--model.n-heads", "1")),
    Variant("no 1/sqrt(H)", patch=leave_scores_unscaled),
    Variant("no 1/sqrt(H), and no QK-norm", ("--model.no-qk-norm",), leave_scores_unscaled),
    Variant("1/sqrt(H), but no QK-norm", ("--model.no-qk-norm",)),
    Variant("learned positions", ("--model.positions", "learned")),
    Variant("sinusoidal positions", ("--model.positions", "sinusoidal")),
    Variant("no positions", ("--model.positions", "none")),
    Variant("post-norm", ("--model.norm-place", "post")),
    Variant("no residual connections", patch=leave_out_residuals),
    NO_MASK,
)


@dataclass(frozen=True)
class Command:
    """How long to train, and where to write the table."""

    out: Path
    """Markdown file that the table is written to."""
    steps: int = 200
    """Optimizer steps of each row."""
    seeds: int = 1
    """Seeds of each row; above 1 the mean is told, with the spread."""
    data: tuple[Path, ...] = field(default=())
    """Text files or folders (default: Python's standard library)."""


def work(variant: Variant, argv: list[str], log: Path) -> None:
    """A process of its own: patch the model, train, leave with train.py's exit code, or DIVERGED.

    Not with 1 for that: any bug would be counted as a loss.
    """
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        sys.path.insert(0, str(ROOT))
        import train
        from gpt.errors import Failed

        if variant.patch:
            variant.patch()
        try:
            code = train.main(argv)
        except Failed:
            code = DIVERGED
        sys.exit(code)


def train_once(variant: Variant, folder: Path, flags: list[str]) -> float:
    """The last validation loss of one run, nats a token; infinite where it diverged."""
    log = folder.with_suffix(".log")
    argv = ["tiny", "--out", str(folder), *EVERY, *flags, *variant.flags]
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=work, args=(variant, argv, log))
    child.start()
    child.join()
    if child.exitcode == DIVERGED:
        return float("inf")
    if child.exitcode:
        raise SystemExit(f"{variant.name}: train.py left with {child.exitcode}\n{log.read_text()}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "val_loss" in line][-1]["val_loss"]


def look_only_back(folder: Path, flags: list[str]) -> float:
    """The loss of a trained run in the unpatched model: one step that changes nothing, for the
    evaluation that follows it."""
    still = ["--learning-rate", "1e-12", "--muon-learning-rate", "1e-12"]
    still += ["--min-learning-rate", "0", "--weight-decay", "0", "--steps", "1"]
    masked = folder.with_name("masked")
    return train_once(WHOLE, masked, [*flags, *still, "--init-from", str(folder)])


def measure(command: Command, variant: Variant, folder: Path) -> tuple[list[float], str]:
    """Losses of a variant, one a seed, and a remark."""
    losses, remark = [], ""
    data = [word for path in command.data for word in ("--data", str(path))]
    for seed in range(command.seeds):
        run, flags = folder / f"{VARIANTS.index(variant)}-{seed}", ["--seed", str(seed), *data]
        length = ["--steps", str(command.steps), "--warmup-steps", str(command.steps // 10)]
        losses.append(train_once(variant, run, flags + length))
        if variant is NO_MASK and not seed:
            masked = look_only_back(run, flags)
            remark = f"the same weights, the mask put back: {masked:.2f}"
    return losses, remark


def row(variant: Variant, losses: list[float], whole: float, remark: str) -> str:
    """One line of the table."""
    mean = sum(losses) / len(losses)
    spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    change = "" if variant is WHOLE else f"{mean - whole:+.3f}"
    return f"| {variant.name} | {mean:.3f}{spread} | {change} | {remark} |"


def main() -> None:
    """Train every row and write the table."""
    command = tyro.cli(Command, description=__doc__)
    rows, whole = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            losses, remark = measure(command, variant, Path(folder))
            whole = whole or sum(losses) / len(losses)
            rows.append(row(variant, losses, whole, remark))
            print(rows[-1], flush=True)
    head = ["| variant | held-out loss, nats a token | change | |", "|---|---|---|---|"]
    made = f"{command.steps} steps of the tiny preset, {command.seeds} seed(s) a row."
    before = command.out.read_text(encoding="utf-8") if command.out.exists() else MARK
    table = "\n".join([*head, *rows])
    command.out.write_text(
        f"{before.partition(MARK)[0]}{MARK}\n\n{made}\n\n{table}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
