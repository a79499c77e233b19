"""Prefill and decode under the machine's roof: which limit each of them meets.

The roof is min(peak FLOP/s, bytes/s x FLOP a byte) (Williams et al. 2009, section 3); both
limits are the measured ones.
"""

from pathlib import Path

import numpy as np


def points(result: dict) -> list[tuple[str, str, float, float]]:
    """(phase, cell, FLOP a byte, FLOP/s) of each phase of each cell."""
    found = []
    for cell in result["cells"]:
        name = f"{cell['batch']} x {cell['prompt_length']}"
        prefill, decode = cell["prefill"], cell["decode"]
        rate = prefill["flops"] / prefill["seconds"]
        found.append(("prefill", name, prefill["flops"] / prefill["bytes"], rate))
        rate = decode["flops_per_step"] / decode["seconds_per_step"]
        intensity = decode["flops_per_step"] / decode["bytes_per_step"]
        found.append(("decode", name, intensity, rate))
    return found


def balance(result: dict) -> float:
    """FLOP a byte at which both limits meet: below it memory is the limit, above it arithmetic."""
    ceilings = result["ceilings"]
    return ceilings["matmul_flops_per_second"] / ceilings["read_bytes_per_second"]


def regime(result: dict, phase: str) -> str:
    """Why a phase is as fast as it is, in a line: its FLOP a byte against the balance point."""
    intensities = [x for kind, _, x, _ in points(result) if kind == phase]
    low, high, at = min(intensities), max(intensities), balance(result)
    sizes = f"{low:,.1f}" if high < 1.05 * low else f"{low:,.1f} to {high:,.1f}"
    if low > at:
        bound = "bound by arithmetic"
    elif high < at:
        bound = "bound by memory"
    else:
        bound = "bound by memory in small cells, by arithmetic in large ones"
    return f"{phase}: {sizes} FLOP a byte against a balance of {at:,.1f}: {bound}"


def draw(result: dict, path: Path) -> None:
    """The picture, in the format that the file's ending names."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    ceilings, found = result["ceilings"], points(result)
    peak, rate = ceilings["matmul_flops_per_second"], ceilings["read_bytes_per_second"]
    spots = [x for *_, x, _ in found] + [balance(result)]
    x = np.geomspace(min(spots) / 3, max(spots) * 3, 200)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.loglog(x, np.minimum(peak, rate * x), color="0.3", label="measured roof")
    for phase, marker, colour in (("prefill", "o", "tab:blue"), ("decode", "s", "tab:orange")):
        mine = [point for point in found if point[0] == phase]
        xs, ys = [point[2] for point in mine], [point[3] for point in mine]
        axes.plot(xs, ys, marker, color=colour, label=f"{phase} (batch x prompt)")
        for _, name, at, height in mine:
            axes.annotate(name, (at, height), xytext=(5, -9), textcoords="offset points", size=8)
    axes.set_xlabel("arithmetic intensity, FLOP a byte")
    axes.set_ylabel("FLOP/s")
    axes.set_title(f"{result['model']} on {result['device']}, {result['precision']}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
