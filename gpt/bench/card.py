"""The result as a person reads it: a card about machine and model, a table of the cells."""

import statistics

import jax
from rich.box import SIMPLE
from rich.console import Group
from rich.panel import Panel
from rich.table import Table

from gpt import cost
from gpt.config import ModelConfig

WIDTH = 120  # a narrower terminal wraps; a cut figure would be lost
COLUMNS = ("\nbatch", "\nprompt", "compile\ns", "1st tok.\nms", "prefill\nms", "\ntokens/s")
COLUMNS += ("\nMFU", "decode\nms", "\ntokens/s", "\nMBU", "p50 / p90 / p99\nms", "peak\nGB")


def about(name: str, config: ModelConfig, ceilings: dict, n_cores: int | None) -> dict:
    """The result without its cells, as JSON values."""
    device = jax.local_devices()[0]
    cores = f", {n_cores} cores" if device.platform == "cpu" else ""
    return {
        "device": f"{device.device_kind}{cores}",
        "precision": config.compute_dtype,
        "model": name,
        "parameters": cost.parameters(config),
        "weight_bytes": cost.weight_bytes(config),
        "jax": jax.__version__,
        "ceilings": ceilings,
    }


def spread(repeats: list[float]) -> str:
    """The median in milliseconds, and half the range as a share of it."""
    median = statistics.median(repeats)
    return f"{median * 1e3:.2f} ±{(max(repeats) - min(repeats)) / 2 / median:.0%}"


def row(cell: dict) -> list[str]:
    """One cell of the result as one line of the table."""
    prefill, decode = cell["prefill"], cell["decode"]
    percentiles = (decode[f"seconds_per_step_p{p}"] * 1e3 for p in (50, 90, 99))
    peak = cell["peak_bytes"]
    return [
        str(cell["batch"]),
        str(cell["prompt_length"]),
        f"{cell['compile_seconds']:.1f}",
        f"{cell['ttft_seconds'] * 1e3:.1f}",
        spread(prefill["seconds_of_repeats"]),
        f"{prefill['tokens_per_second']:,.0f}",
        f"{prefill['mfu']:.0%}",
        spread(decode["seconds_per_step_of_repeats"]),
        f"{decode['tokens_per_second']:,.0f}",
        f"{decode['mbu']:.0%}",
        " / ".join(f"{p:.2f}" for p in percentiles),
        "unknown" if peak is None else f"{peak / 1e9:.2f}",
    ]


def drawing(result: dict) -> Group:
    """Card and table, ready to be printed."""
    ceilings = result["ceilings"]
    lines = (
        f"{result['model']}: {result['parameters'] / 1e6:.1f} M parameters, "
        f"{result['weight_bytes'] / 1e6:.1f} MB of weights, computing in {result['precision']}",
        f"{result['device']}, jax {result['jax']}; measured at best: "
        f"{ceilings['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"{ceilings['read_bytes_per_second'] / 1e9:,.1f} GB/s",
        f"Medians ± half the range of {result['repeats']} repeats, compilation apart. Decode is a "
        "step of the device's loop;",
        "p50 to p99 are those of steps driven from the host. MFU and MBU: shares of what was "
        "measured at best.",
    )
    table = Table(box=SIMPLE, collapse_padding=True, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for cell in result["cells"]:
        table.add_row(*row(cell))
    return Group(Panel("\n".join(lines), expand=False), table)
