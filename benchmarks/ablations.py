"""What each part of the Transformer contributes: the tiny preset, trained without it.

    python benchmarks/ablations.py --out docs/how-it-works.md --steps 200

Every row trains for the same number of steps on the same batches of Python's standard library and
reports the loss on held-out text. Flags leave out the parts that have a setting; the rest, which
nobody should want to leave out, are patched here, in the process that trains the row.
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

from gpt.wording import counted

ROOT = Path(__file__).parent.parent
MARK = "<!-- made by benchmarks/ablations.py -->"
DIVERGED = 77  # the exit code after too many steps that are not finite
COMMON_FLAGS = ["--log-every", "50", "--sample-every", "0", "--keep-best", "0"]
COMMON_FLAGS += ["--eval-every", "1000000", "--save-every", "1000000"]


def share_queries_and_keys() -> None:
    """Use the queries as keys: scores become symmetric, apart from RoPE's rotation."""
    from gpt.model.attention import Attention

    project = Attention.project

    def shared(self, x_BTD):
        q_BTNH, _, v_BTKH = project(self, x_BTD)
        return q_BTNH, q_BTNH, v_BTKH

    Attention.project = shared


def leave_scores_unscaled() -> None:
    """Multiply the queries by sqrt(H), to cancel the later division of the scores."""
    from gpt.model.attention import Attention

    project = Attention.project

    def unscaled(self, x_BTD):
        q_BTNH, k_BTKH, v_BTKH = project(self, x_BTD)
        return q_BTNH * q_BTNH.shape[-1] ** 0.5, k_BTKH, v_BTKH

    Attention.project = unscaled


def leave_out_residuals() -> None:
    """Pass on each sublayer's output without adding its input."""
    from gpt.model import transformer

    class Bare(transformer.Block):
        def __call__(self, x_BTD, past, dropout_key_B, positions, attend):
            y_BTD = self.attention_norm(x_BTD)
            x_BTD, past = self.attention(y_BTD, past, dropout_key_B, positions, attend)
            return self.mlp(self.mlp_norm(x_BTD)), past

    transformer.BLOCKS["pre"] = Bare


def leave_out_mask() -> None:
    """Let every token see the whole window, including the token to predict."""
    import jax.numpy as jnp

    from gpt.model import attention, flash_attention

    flash_attention.KERNELS.clear()  # they have masks of their own
    attention.visible = lambda pos_BT, n_queries, n_slots: jnp.ones((1, n_queries, n_slots), bool)


@dataclass(frozen=True)
class Variant:
    """A row of the table: its name, the flags of train.py, and a patch of the model."""

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
    """Markdown file to write the table to."""
    steps: int = 200
    """Optimizer steps per row."""
    seeds: int = 1
    """Seeds per row; with several, the table shows mean and range."""
    data: tuple[Path, ...] = field(default=())
    """Text files or folders (default: Python's standard library)."""


def work(variant: Variant, argv: list[str], log: Path) -> None:
    """Patch the model and train, in a separate process; exit with train.py's code or DIVERGED.

    DIVERGED is needed because train.py exits with 1 if the loss diverges, as Python does after any
    bug.
    """
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
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
    """The last validation loss of one run, in nats per token; infinite if it diverged."""
    log = folder.with_suffix(".log")
    argv = ["tiny", "--out", str(folder), *COMMON_FLAGS, *flags, *variant.flags]
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=work, args=(variant, argv, log))
    child.start()
    child.join()
    if child.exitcode == DIVERGED:
        return float("inf")
    if child.exitcode:
        raise SystemExit(
            f"{variant.name}: train.py exited with {child.exitcode}\n{log.read_text()}"
        )
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record["val_loss"] for record in records if "val_loss" in record][-1]


def loss_with_mask(folder: Path, flags: list[str]) -> float:
    """A trained run's loss in the unpatched model, evaluated after one step at a learning rate of
    practically zero."""
    still = ["--learning-rate", "1e-12", "--muon-learning-rate", "1e-12"]
    still += ["--min-learning-rate", "0", "--weight-decay", "0", "--steps", "1"]
    masked = folder.with_name("masked")
    return train_once(WHOLE, masked, [*flags, *still, "--init-from", str(folder)])


def measure(command: Command, variant: Variant, folder: Path) -> tuple[list[float], str]:
    """The losses of a variant, one per seed, and a remark."""
    length = ["--steps", str(command.steps), "--warmup-steps", str(command.steps // 10)]
    data: list[str] = []
    for path in command.data:
        data += ["--data", str(path)]

    losses, remark = [], ""
    for seed in range(command.seeds):
        run = folder / f"{VARIANTS.index(variant)}-{seed}"
        flags = ["--seed", str(seed), *data]
        losses.append(train_once(variant, run, flags + length))
        if variant is NO_MASK and seed == 0:
            remark = f"the same weights, the mask put back: {loss_with_mask(run, flags):.2f}"
    return losses, remark


def table_row(variant: Variant, losses: list[float], loss_of_whole: float, remark: str) -> str:
    mean = sum(losses) / len(losses)
    loss = f"{mean:.3f}"
    if len(losses) > 1:
        loss += f" ({min(losses):.3f} to {max(losses):.3f})"
    change = ""
    if variant is not WHOLE:
        change = f"{mean - loss_of_whole:+.3f}"
    return f"| {variant.name} | {loss} | {change} | {remark} |"


def main() -> None:
    """Train every row and write the table."""
    command = tyro.cli(Command, description=__doc__)
    rows = ["| variant | held-out loss, nats per token | change | |", "|---|---|---|---|"]
    loss_of_whole = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            losses, remark = measure(command, variant, Path(folder))
            if variant is WHOLE:
                loss_of_whole = sum(losses) / len(losses)
            rows.append(table_row(variant, losses, loss_of_whole, remark))
            print(rows[-1], flush=True)

    # The table replaces whatever follows the mark.
    text = MARK
    if command.out.exists():
        text = command.out.read_text(encoding="utf-8")
    before, _, _ = text.partition(MARK)
    made = f"{command.steps} steps of the tiny preset, {counted(command.seeds, 'seed')} per row."
    table = "\n".join(rows)
    command.out.write_text(f"{before}{MARK}\n\n{made}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
