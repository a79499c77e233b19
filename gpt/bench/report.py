"""A result as people read it: card and table, the roofline drawing, and two results compared.

A result is the JSON that `python -m gpt.bench --json` writes. Nothing here needs JAX.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Group, JustifyMethod
from rich.panel import Panel
from rich.table import Table

from gpt.errors import UserError, require

WIDTH = 124  # a narrower terminal wraps; a truncated figure would be lost
WIDE_SPREAD = 0.1  # half the range of the repeats, as a share of the median, that is marked with !
# Dense bfloat16 FLOP/s and memory bytes/s by the data sheets of NVIDIA and Google Cloud of 2025.
# They are shown beside what was measured, never in place of it.
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


def card(result: dict) -> Group:
    """Card and table, ready to be printed."""
    best, cells = result["ceilings"], result["cells"]
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:.1f} M parameters, "
        f"{result['weight_bytes'] / 1e6:.1f} MB of {result['weights']} weights, "
        f"computing in {result['precision']}",
        f"{result['device']}, jax {result['jax']}; measured at best: "
        f"{best['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s, reading "
        f"{best['read_bytes_per_second'] / 1e9:,.1f} GB/s{vendor_peak(result['device'])}",
        f"Medians ± half the range of {result['repeats']} repeats, compilation apart; ! marks more "
        f"than {WIDE_SPREAD:.0%}: measure again on a quiet machine.",
    ]
    if "train" in cells[0]:
        lines.append(
            "A step reads one batch, in as many micro-batches as the table says, and updates the "
            "weights. MFU: share of the measured matrix rate; recomputation is not counted."
        )
    else:
        lines += [regime(result, "prefill"), regime(result, "decode")]
        lines.append(
            "Decode is a step of the device's loop; p50 to p99 are steps driven from the host. MFU "
            "and MBU: shares of the measured rates of matrix products and of reading."
        )
    table = make_table([cell_row(cell) for cell in cells])
    return Group(Panel("\n".join(lines), expand=False), table)


def cell_line(cell: dict) -> str:
    """A row of the table as one line that can be read by itself."""
    return "; ".join(f"{' '.join(name.split())}: {text}" for name, text in cell_row(cell))


Row = list[tuple[str, str]]
"""Columns by name, and what a row has in them."""


def make_table(rows: list[Row], justify: JustifyMethod = "right") -> Table:
    table = Table(box=SIMPLE, collapse_padding=True, pad_edge=False)
    for name, _ in rows[0]:
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(text for _, text in row))
    return table


def cell_row(cell: dict) -> Row:
    """The table's columns for a cell of sampling or of training."""
    compile_seconds = f"{cell['compile_seconds']:.1f}"
    peak_bytes = cell["peak_bytes"]
    peak = ("peak\nGB", "unknown" if peak_bytes is None else f"{peak_bytes / 1e9:.2f}")
    if "train" in cell:
        train = cell["train"]
        return [
            ("\nbatch", str(cell["batch"])),
            ("micro-\nbatches", str(cell["grad_accum"])),
            ("\ntokens", str(cell["seq_len"])),
            ("compile\ns", compile_seconds),
            ("step\nms", milliseconds(train["seconds_of_repeats"])),
            ("\ntokens/s", f"{train['tokens_per_second']:,.0f}"),
            ("\nMFU", f"{train['mfu']:.0%}"),
            peak,
        ]

    prefill, decode = cell["prefill"], cell["decode"]
    percentiles = [decode[f"seconds_per_step_p{p}"] * 1e3 for p in (50, 90, 99)]
    return [
        ("\nbatch", str(cell["batch"])),
        ("\nprompt", str(cell["prompt_length"])),
        ("compile\ns", compile_seconds),
        ("1st tok.\nms", f"{cell['ttft_seconds'] * 1e3:.1f}"),
        ("prefill\nms", milliseconds(prefill["seconds_of_repeats"])),
        ("\ntokens/s", f"{prefill['tokens_per_second']:,.0f}"),
        ("\nMFU", f"{prefill['mfu']:.0%}"),
        ("decode\nms", milliseconds(decode["seconds_per_step_of_repeats"])),
        ("\ntokens/s", f"{decode['tokens_per_second']:,.0f}"),
        ("\nMBU", f"{decode['mbu']:.0%}"),
        ("p50 / p90 / p99\nms", " / ".join(f"{p:.2f}" for p in percentiles)),
        peak,
    ]


def milliseconds(repeats: Sequence[float]) -> str:
    """The median, and half the range as a share of it; ! if that is wide."""
    median = statistics.median(repeats)
    spread = (max(repeats) - min(repeats)) / 2 / median
    mark = "!" if spread > WIDE_SPREAD else ""
    return f"{median * 1e3:.2f} ±{spread:.0%}{mark}"


def vendor_peak(device_kind: str) -> str:
    """What the vendor of a device states; nothing for a device that is not in the list."""
    for name, (n_flops, n_bytes) in VENDOR_PEAKS.items():
        if device_kind.endswith(name):
            return (
                f"; the vendor states {n_flops / 1e12:,.0f} TFLOP/s in bfloat16 and "
                f"{n_bytes / 1e12:,.2f} TB/s"
            )
    return ""


# --- the roofline (Williams et al. 2009, section 3): min(peak FLOP/s, bytes/s x FLOP per byte) ---


PHASES = {
    "prefill": ("flops", "bytes", "seconds"),
    "decode": ("flops_per_step", "bytes_per_step", "seconds_per_step"),
}


def points(result: dict, phase: str) -> list[tuple[float, float]]:
    """FLOP per byte and FLOP/s of a phase of each cell."""
    found = []
    for cell in result["cells"]:
        n_flops, n_bytes, seconds = (cell[phase][key] for key in PHASES[phase])
        found.append((n_flops / n_bytes, n_flops / seconds))
    return found


def balance(result: dict) -> float:
    """FLOP per byte at which both limits meet: below it memory limits, above it arithmetic."""
    ceilings = result["ceilings"]
    return ceilings["matmul_flops_per_second"] / ceilings["read_bytes_per_second"]


def regime(result: dict, phase: str) -> str:
    """One line on what limits a phase: its FLOP per byte against the balance point."""
    intensities = [intensity for intensity, _ in points(result, phase)]
    low, high, limit = min(intensities), max(intensities), balance(result)
    if low > limit:
        bound = "bound by arithmetic"
    elif high < limit:
        bound = "bound by memory"
    else:
        bound = "small cells are bound by memory, large ones by arithmetic"
    span = f"{low:,.1f}"
    if high >= 1.05 * low:
        span = f"{low:,.1f} to {high:,.1f}"
    return f"{phase}: {span} FLOP per byte against a balance of {limit:,.1f}: {bound}"


def draw_roofline(result: dict, path: Path) -> None:
    """The picture, in the format that the file's suffix names."""
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

MACHINE_TOLERANCE = 0.05  # ceilings that differ by less are those of the same machine
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
    `spread`: the interquartile ranges of both, as shares of their medians, added. Of five repeats
    of the same program, one pair in twenty differs by more than this through chance."""

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
    """A result from its file; UserError if it is not one."""
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


def machine_change(old: dict, new: dict) -> str:
    """One line: whether the machine itself changed, by the ceilings of both runs."""
    ratios = {name: new["ceilings"][key] / old["ceilings"][key] for key, name in CEILINGS.items()}
    changes = ", ".join(f"{name} {ratio:.2f}x as fast" for name, ratio in ratios.items())
    if all(abs(ratio - 1) <= MACHINE_TOLERANCE for ratio in ratios.values()):
        return f"the machine is the same within {MACHINE_TOLERANCE:.0%}: {changes} as before"
    return f"the machine CHANGED between the runs: {changes} as before"


def changes_between(old: dict, new: dict) -> list[Change]:
    """Each figure of each cell that both results have."""
    before = {cell_name(cell): cell for cell in old["cells"]}
    changes = []
    for cell in new["cells"]:
        cell_before = before.get(cell_name(cell), {})
        for name, (phase, key) in REPEATS.items():
            if phase in cell and phase in cell_before:
                repeats = cell_before[phase][key], cell[phase][key]
                changes.append(change(cell_name(cell), name, *repeats))
    require(bool(changes), "the two results have no cell in common: measure the same sizes twice")
    return changes


def change(cell: str, name: str, old: Sequence[float], new: Sequence[float]) -> Change:
    """The change of one figure, from the seconds of its repeats."""
    old_q1, old_median, old_q3 = np.percentile(old, [25, 50, 75]).tolist()
    new_q1, new_median, new_q3 = np.percentile(new, [25, 50, 75]).tolist()
    spread = (old_q3 - old_q1) / old_median + (new_q3 - new_q1) / new_median
    return Change(cell, name, new_median / old_median, spread)


def cell_name(cell: dict) -> str:
    """What a cell was measured with."""
    return ", ".join(f"{key.replace('_', ' ')} {cell[key]}" for key in SIZES if key in cell)


def changes_table(changes: Sequence[Change]) -> Table:
    rows = [
        [
            ("cell", one.cell),
            ("figure", one.name),
            ("new / old", f"{one.ratio:.3f}"),
            ("spread", f"±{one.spread:.3f}"),
            ("verdict", one.verdict),
        ]
        for one in changes
    ]
    return make_table(rows, justify="left")


def parse_share(text: str) -> float:
    """`5%` or `0.05` as 0.05; UserError for anything else."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    require(0 <= share < math.inf, f"--fail-if-slower {text}: expected a share such as 5%")
    return share
