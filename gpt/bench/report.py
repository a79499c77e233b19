"""Results for people to read: card and table, roofline plot, and comparison of two results.

A result is the JSON that `python -m gpt.bench --json` writes. Nothing here needs JAX.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import filesize
from rich.box import SIMPLE
from rich.console import JustifyMethod
from rich.panel import Panel
from rich.table import Table

from gpt.errors import UserError, require

WIDTH = 100  # of the card; a narrower terminal wraps it
TABLE_WIDTH = 140  # wide enough not to truncate figures
WIDE_SPREAD = 0.1  # repeats whose half-range exceeds this share of the median are marked !
# Dense bfloat16 FLOP/s and memory bytes/s from NVIDIA's and Google Cloud's data sheets of 2025.
# They are shown next to the measured rates, never instead of them.
VENDOR_PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H100 PCIe": (756e12, 2.0e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "L4": (121e12, 0.3e12),
    "TPU v4": (275e12, 1.228e12),
    "TPU v5 lite": (197e12, 0.819e12),
    "TPU v5p": (459e12, 2.765e12),
    "TPU v6 lite": (918e12, 1.64e12),
}


# --- card and table ---


def card(result: dict, verbose: bool = False) -> Panel:
    """What was measured, what limits it, and how to read the table. `verbose` adds the
    vendor's peak rates."""
    best, cells = result["ceilings"], result["cells"]
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:.1f} M parameters, "
        f"{filesize.decimal(result['weight_bytes'])} of {result['weights']} weights, "
        f"computing in {result['precision']}",
        f"{result['device']}, jax {result['jax']}; measured at best: "
        f"{best['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s in matrix products, "
        f"reading {best['read_bytes_per_second'] / 1e9:,.1f} GB/s",
    ]
    for name, (n_flops, n_bytes) in VENDOR_PEAKS.items():
        if verbose and result["device"].endswith(name):
            lines.append(
                f"the vendor states {n_flops / 1e12:,.0f} TFLOP/s in bfloat16 and "
                f"{n_bytes / 1e12:,.2f} TB/s"
            )
    lines.append("")
    if "train" in cells[0]:
        lines += [
            "A step reads one batch, in as many micro-batches as the table says, and updates the "
            "weights.",
            "MFU, model FLOPs utilization: FLOP/s as a share of the measured matrix-product rate.",
        ]
    else:
        lines += [
            f"prefill: {regime(result, 'prefill')}",
            f"decode: {regime(result, 'decode')}",
            "",
            "Prefill reads the prompts; each step of decode writes one token in every row.",
            "MFU, model FLOPs utilization: FLOP/s as a share of the measured matrix-product rate.",
            "MBU, memory bandwidth utilization: bytes/s as a share of the measured reading rate.",
        ]
    if "speculation" in cells[0]:
        lines += [
            "",
            f"Second table: {cells[0]['speculation']['proposals']} proposals in each step and "
            f"plain decoding, in turns. Prompts: {result['speculation_prompts']}.",
            "tokens per reading: what a row gains by a step, which reads the weights once.",
            "effective MBU: the MBU at which plain decoding would give as many tokens/s.",
            "",
        ]
    lines += [
        f"± is half the range of {result['repeats']} repeats; ! marks more than {WIDE_SPREAD:.0%}: "
        "measure again on a quiet machine.",
        "Compilation is left out.",
    ]
    if verbose and "train" not in cells[0]:
        lines.append(
            "host-driven: decode steps started one by one from Python (50th, 90th, 99th percentile)"
        )
    return Panel("\n".join(lines), expand=False)


Row = list[tuple[str, str]]
"""A row's column names and cell texts."""


def make_table(rows: list[Row], justify: JustifyMethod = "right") -> Table:
    table = Table(box=SIMPLE, collapse_padding=True, pad_edge=False)
    for name, _ in rows[0]:
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(text for _, text in row))
    return table


def cell_row(cell: dict, verbose: bool = False) -> Row:
    """The table's columns for a cell of sampling or of training."""
    details = [
        ("compile\ns", f"{cell['compile_seconds']:.1f}"),
        ("peak\nGB", f"{cell['peak_bytes'] / 1e9:.2f}"),
    ]
    if "train" in cell:
        train = cell["train"]
        row = [
            ("\nbatch", str(cell["batch"])),
            ("micro-\nbatches", str(cell["grad_accum"])),
            ("\ntokens", str(cell["seq_len"])),
            ("step\nms", milliseconds(train["seconds_of_repeats"])),
            ("\ntokens/s", f"{train['tokens_per_second']:,.0f}"),
            ("\nMFU", f"{train['mfu']:.0%}"),
        ]
    else:
        prefill, decode = cell["prefill"], cell["decode"]
        row = [
            ("\nbatch", str(cell["batch"])),
            ("prompt\ntokens", str(cell["prompt_length"])),
            ("first token\nafter ms", f"{cell['ttft_seconds'] * 1e3:.1f}"),
            ("prefill\nms", milliseconds(prefill["seconds_of_repeats"])),
            ("prefill\ntokens/s", f"{prefill['tokens_per_second']:,.0f}"),
            ("\nMFU", f"{prefill['mfu']:.0%}"),
            ("decode\nms per step", milliseconds(decode["seconds_per_step_of_repeats"])),
            ("decode\ntokens/s", f"{decode['tokens_per_second']:,.0f}"),
            ("\nMBU", f"{decode['mbu']:.0%}"),
        ]
        percentiles = [decode[f"seconds_per_step_p{p}"] * 1e3 for p in (50, 90, 99)]
        host_driven = " / ".join(f"{p:.2f}" for p in percentiles)
        details.insert(0, ("host-driven\np50 / p90 / p99 ms", host_driven))
    return row + details if verbose else row


def speculation_row(cell: dict) -> Row:
    """The columns that compare decoding with and without proposals."""
    found = cell["speculation"]
    accepted = f"{found['accepted']:,} of {found['proposed']:,}"
    speedups = np.divide(found["plain_seconds_of_repeats"], found["seconds_of_repeats"]).tolist()
    return [
        ("\nbatch", str(cell["batch"])),
        ("prompt\ntokens", str(cell["prompt_length"])),
        ("plain decode\ntokens/s", f"{found['plain_tokens_per_second']:,.0f}"),
        ("with proposals\ntokens/s", f"{found['tokens_per_second']:,.0f}"),
        ("\nspeedup", f"{statistics.median(speedups):.2f} {spread(speedups)}"),
        ("proposals\naccepted", accepted),
        ("tokens per\nreading", f"{found['tokens_per_reading']:.2f}"),
        ("\nMBU", f"{found['mbu']:.0%}"),
        ("effective\nMBU", f"{found['effective_mbu']:.0%}"),
    ]


def milliseconds(repeats: Sequence[float]) -> str:
    """The median of `repeats`, given in seconds, and their spread."""
    return f"{statistics.median(repeats) * 1e3:.2f} {spread(repeats)}"


def spread(repeats: Sequence[float]) -> str:
    """Half the range as a share of the median, marked ! if wide."""
    share = (max(repeats) - min(repeats)) / 2 / statistics.median(repeats)
    mark = "!" if share > WIDE_SPREAD else ""
    return f"±{share:.0%}{mark}"


# --- the roofline (Williams et al. 2009, section 3): min(peak FLOP/s, bytes/s x FLOP per byte) ---


PHASES = {
    "prefill": ("flops", "bytes", "seconds"),
    "decode": ("flops_per_step", "bytes_per_step", "seconds_per_step"),
}


def points(result: dict, phase: str) -> list[tuple[float, float]]:
    """Each cell's FLOP per byte and FLOP/s in a phase."""
    found = []
    for cell in result["cells"]:
        n_flops, n_bytes, seconds = (cell[phase][key] for key in PHASES[phase])
        found.append((n_flops / n_bytes, n_flops / seconds))
    return found


def balance(result: dict) -> float:
    """FLOP per byte at which the limits meet: memory-bound below it, compute-bound above it."""
    ceilings = result["ceilings"]
    return ceilings["matmul_flops_per_second"] / ceilings["read_bytes_per_second"]


def regime(result: dict, phase: str) -> str:
    """What limits a phase: its FLOP per byte against the balance point."""
    intensities = [intensity for intensity, _ in points(result, phase)]
    low, high, limit = min(intensities), max(intensities), balance(result)
    if low > limit:
        limited = "limited by compute"
    elif high < limit:
        limited = "limited by memory"
    else:
        limited = "small cells are limited by memory, large ones by compute"
    span = f"{low:,.1f}"
    if high >= 1.05 * low:
        span = f"{low:,.1f} to {high:,.1f}"
    return f"{limited} ({span} FLOP per byte; this machine breaks even at {limit:,.1f})"


def draw_roofline(result: dict, path: Path) -> None:
    """Plot prefill and decode under the roofline, in the format of the file's suffix."""
    from matplotlib.figure import Figure

    peak = result["ceilings"]["matmul_flops_per_second"]
    rate = result["ceilings"]["read_bytes_per_second"]
    intensities = [x for phase in PHASES for x, _ in points(result, phase)] + [balance(result)]
    roof = np.geomspace(min(intensities) / 3, max(intensities) * 3, 200)

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.loglog(roof, np.minimum(peak, rate * roof), color="0.3", label="measured roof")
    for phase, marker, color in (("prefill", "o", "tab:blue"), ("decode", "s", "tab:orange")):
        found = points(result, phase)
        axes.plot(*zip(*found, strict=True), marker, color=color, label=f"{phase} (batch x prompt)")
        for cell, at in zip(result["cells"], found, strict=True):
            name = f"{cell['batch']} x {cell['prompt_length']}"
            axes.annotate(name, at, xytext=(5, -9), textcoords="offset points", size=8)
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("FLOP/s")
    axes.set_title(f"{result['model']} on {result['device']}, {result['precision']}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)


# --- two results compared ---

MACHINE_TOLERANCE = 0.05  # ceilings that differ by less count as the same machine
CEILINGS = {
    "matmul_flops_per_second": "matrix products",
    "read_bytes_per_second": "reading memory",
}
REPEATS = {
    "prefill": ("prefill", "seconds_of_repeats"),
    "decode step": ("decode", "seconds_per_step_of_repeats"),
    "training step": ("train", "seconds_of_repeats"),
}
SIZES = ("batch", "grad_accum", "prompt_length", "new_tokens", "seq_len")


@dataclass(frozen=True)
class Change:
    """One figure of one cell in two results. `ratio`: new median over old (above 1: slower).
    `spread`: the sum of both interquartile ranges, each as a share of its median. With five repeats
    of the same program, one pair in twenty differs by more than this by chance."""

    cell: str
    name: str
    ratio: float
    spread: float

    @property
    def verdict(self) -> str:
        if abs(self.ratio - 1) <= self.spread:
            return "no difference"
        return "slower" if self.ratio > 1 else "faster"


def read_result(path: Path) -> dict:
    """Read a result from its file; UserError if it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if min(result["ceilings"][name] for name in CEILINGS) <= 0:
            raise ValueError
        for cell in result["cells"]:
            times = [cell[phase][key] for phase, key in REPEATS.values() if phase in cell]
            if not times or any(len(repeats) < 2 or min(repeats) <= 0 for repeats in times):
                raise ValueError
        return result
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a result of `python -m gpt.bench --json` with at least two repeats"
        ) from None


def compare_machines(old: dict, new: dict) -> tuple[bool, str]:
    """Whether the ceilings show the same machine in the same state, and a line that says so."""
    if old["device"] != new["device"]:
        return False, f"the machine CHANGED: {old['device']} before, {new['device']} now"
    ratios = {name: new["ceilings"][key] / old["ceilings"][key] for key, name in CEILINGS.items()}
    changes = ", ".join(f"{name} {ratio:.2f}x as fast" for name, ratio in ratios.items())
    if all(abs(ratio - 1) <= MACHINE_TOLERANCE for ratio in ratios.values()):
        return True, f"the machine is the same within {MACHINE_TOLERANCE:.0%}: {changes} as before"
    return False, f"the machine CHANGED between the runs: {changes} as before"


def name_cell(cell: dict) -> str:
    """A cell's sizes, as text."""
    return ", ".join(f"{size.replace('_', ' ')} {cell[size]}" for size in SIZES if size in cell)


def changes_between(old: dict, new: dict) -> list[Change]:
    """The change in each figure of each cell that both results have."""
    before = {name_cell(cell): cell for cell in old["cells"]}
    changes = []
    for after in new["cells"]:
        cell = name_cell(after)
        for name, (phase, key) in REPEATS.items():
            if cell in before and phase in before[cell] and phase in after:
                change = compare_repeats(cell, name, before[cell][phase][key], after[phase][key])
                changes.append(change)
    require(bool(changes), "the two results have no cell in common: measure the same sizes twice")
    return changes


def compare_repeats(cell: str, name: str, old: Sequence[float], new: Sequence[float]) -> Change:
    """The change in one figure, from its repeats in seconds."""
    old_q1, old_median, old_q3 = np.percentile(old, [25, 50, 75]).tolist()
    new_q1, new_median, new_q3 = np.percentile(new, [25, 50, 75]).tolist()
    spread = (old_q3 - old_q1) / old_median + (new_q3 - new_q1) / new_median
    return Change(cell, name, new_median / old_median, spread)


def parse_share(text: str) -> float:
    """`5%` or `0.05` as 0.05; UserError for anything else."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    require(0 <= share < math.inf, f"--fail-if-slower {text}: expected a share such as 5%")
    return share
