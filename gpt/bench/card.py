"""The result as a person reads it: a card about machine and model, a table of the cells."""

import statistics

import jax
from rich.box import SIMPLE
from rich.console import Group
from rich.panel import Panel
from rich.table import Table

from gpt import flops
from gpt.bench import roofline, vendor
from gpt.config import ModelConfig

WIDTH = 124  # a narrower terminal wraps; a cut figure would be lost
WIDE = (
    0.1  # half the range of the repeats, as a share of the median, above which a figure is marked
)
COLUMNS = ("\nbatch", "\nprompt", "compile\ns, cached", "1st tok.\nms", "prefill\nms")
COLUMNS += ("\ntokens/s", "\nMFU", "decode\nms", "\ntokens/s", "\nMBU")
COLUMNS += ("p50 / p90 / p99\nms", "peak\nGB")
TRAIN_COLUMNS = ("\nbatch", "\ntokens", "compile\ns", "step\nms", "\ntokens/s", "\nMFU", "peak\nGB")


def about(
    name: str, config: ModelConfig, ceilings: dict, n_cores: int | None, int8: bool = False
) -> dict:
    """The result without its cells, as JSON values."""
    device = jax.local_devices()[0]
    cores = f", {n_cores} cores" if device.platform == "cpu" else ""
    return {
        "device": f"{device.device_kind}{cores}",
        "precision": config.compute_dtype,
        "model": name,
        "parameters": flops.parameters(config),
        "weights": "int8" if int8 else config.param_dtype,
        "weight_bytes": flops.weight_bytes(config, int8=int8),
        "jax": jax.__version__,
        "ceilings": ceilings,
    }


def spread(repeats: list[float]) -> str:
    """The median in milliseconds, and half the range as a share of it; ! where that is wide."""
    median = statistics.median(repeats)
    half = (max(repeats) - min(repeats)) / 2 / median
    return f"{median * 1e3:.2f} ±{half:.0%}{'!' if half > WIDE else ''}"


def gigabytes(peak: int | None) -> str:
    """Memory, where it is known."""
    return "unknown" if peak is None else f"{peak / 1e9:.2f}"


def row(cell: dict) -> list[str]:
    """One cell of the result as one line of the table."""
    prefill, decode = cell["prefill"], cell["decode"]
    percentiles = (decode[f"seconds_per_step_p{p}"] * 1e3 for p in (50, 90, 99))
    cached = cell["cached_compile_seconds"]
    return [
        str(cell["batch"]),
        str(cell["prompt_length"]),
        f"{cell['compile_seconds']:.1f}" + (f", {cached:.1f}" if cached is not None else ""),
        f"{cell['ttft_seconds'] * 1e3:.1f}",
        spread(prefill["seconds_of_repeats"]),
        f"{prefill['tokens_per_second']:,.0f}",
        f"{prefill['mfu']:.0%}",
        spread(decode["seconds_per_step_of_repeats"]),
        f"{decode['tokens_per_second']:,.0f}",
        f"{decode['mbu']:.0%}",
        " / ".join(f"{p:.2f}" for p in percentiles),
        gigabytes(cell["peak_bytes"]),
    ]


def train_row(cell: dict) -> list[str]:
    """One batch size of a training result as one line of the table."""
    train = cell["train"]
    return [
        str(cell["batch"]),
        str(cell["seq_len"]),
        f"{cell['compile_seconds']:.1f}",
        spread(train["seconds_of_repeats"]),
        f"{train['tokens_per_second']:,.0f}",
        f"{train['mfu']:.0%}",
        gigabytes(cell["peak_bytes"]),
    ]


def heading(result: dict) -> list[str]:
    """What was measured, on what, and how good that is at best."""
    c = result["ceilings"]
    return [
        f"{result['model']}: {result['parameters'] / 1e6:.1f} M parameters, "
        f"{result['weight_bytes'] / 1e6:.1f} MB of {result['weights']} weights, "
        f"computing in {result['precision']}",
        f"{result['device']}, jax {result['jax']}; measured at best: "
        f"{c['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s, reading "
        f"{c['read_bytes_per_second'] / 1e9:,.1f} GB/s, copying "
        f"{c['copy_bytes_per_second'] / 1e9:,.1f} GB/s; {vendor.describe(result['device'])}",
        f"(a bare product of two matrices reads {c['bare_matmul_mfu']:.0%} MFU here, of a matrix "
        f"and a vector {c['bare_matvec_mbu']:.0%} MBU)",
        f"Medians ± half the range of {result['repeats']} repeats, compilation apart; ! marks more "
        f"than {WIDE:.0%}: measure again on a quiet machine.",
    ]


def table(columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    """Figures in columns, to the right."""
    drawn = Table(box=SIMPLE, collapse_padding=True, pad_edge=False)
    for name in columns:
        drawn.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        drawn.add_row(*cells)
    return drawn


def drawing(result: dict) -> Group:
    """Card and table, ready to be printed."""
    lines = heading(result)
    if "train" in result["cells"][0]:
        lines.append("MFU: share of the matrix rate measured at best, recomputation not counted.")
        rows = [train_row(cell) for cell in result["cells"]]
        return Group(Panel("\n".join(lines), expand=False), table(TRAIN_COLUMNS, rows))
    lines += [roofline.regime(result, phase) for phase in ("prefill", "decode")]
    lines.append(
        "Decode is a step of the device's loop; p50 to p99 are those of steps driven from the "
        "host. MFU and MBU: shares of what was measured at best."
    )
    rows = [row(cell) for cell in result["cells"]]
    return Group(Panel("\n".join(lines), expand=False), table(COLUMNS, rows))
