"""Two results side by side: ratios, their spread, and which differences exceed the noise.

Knows nothing of how they were measured: two files of `python -m gpt.bench --json`.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from gpt.errors import UserError, require

LEVEL = 0.05  # how often two samples of one distribution may be called different
MOST_SPLITS = 4000  # all ways to deal the repeats out are tried up to here, then as many at random
REPEATS = {
    "prefill": ("prefill", "seconds_of_repeats"),
    "decode step": ("decode", "seconds_per_step_of_repeats"),
    "training step": ("train", "seconds_of_repeats"),
}
SETTING = ("device", "precision", "weights", "model", "jax")


@dataclass(frozen=True)
class Change:
    """One figure of one cell, seconds before and after: `ratio` of the medians (above 1: slower),
    `low` and `high`: the middle nine tenths of the ratios of all pairs, `chance`: how often two
    samples of one distribution would differ as much."""

    cell: str
    name: str
    ratio: float
    low: float
    high: float
    chance: float

    @property
    def differs(self) -> bool:
        """Whether it is more than noise."""
        return self.chance < LEVEL

    @property
    def verdict(self) -> str:
        """In words."""
        return ("slower" if self.ratio > 1 else "faster") if self.differs else "no difference"


def permutation_test(old: Sequence[float], new: Sequence[float]) -> float:
    """How often the means of logarithms lie as far apart when the labels old and new are dealt out
    anew: the two-sided permutation test (Fisher 1935; Good 2005, section 3.1)."""
    both, n = np.log([*old, *new]), len(old)
    picks = itertools.combinations(range(len(both)), n)
    if math.comb(len(both), n) > MOST_SPLITS:
        rng = np.random.default_rng(0)
        picks = (rng.permutation(len(both))[:n] for _ in range(MOST_SPLITS))
    sums = np.array([both[list(pick)].sum() for pick in picks])
    gaps = np.abs(sums / n - (both.sum() - sums) / (len(both) - n))
    seen = abs(both[:n].mean() - both[n:].mean())
    return float(np.mean(gaps >= seen - 1e-12))


def compare_figure(cell: str, name: str, old: Sequence[float], new: Sequence[float]) -> Change:
    """The change of one figure from its repeats."""
    pairs = np.divide.outer(np.array(new), np.array(old))
    low, high = np.percentile(pairs, [5, 95])
    ratio = statistics.median(new) / statistics.median(old)
    return Change(cell, name, ratio, float(low), float(high), permutation_test(old, new))


def label(cell: dict) -> str:
    """What a cell was measured at."""
    parts = ("batch", "prompt_length", "new_tokens", "seq_len")
    return ", ".join(f"{name.replace('_', ' ')} {cell[name]}" for name in parts if name in cell)


def compare(old: dict, new: dict) -> Iterator[Change]:
    """Each figure of each cell that both results have."""
    before = {label(cell): cell for cell in old["cells"]}
    common = [cell for cell in new["cells"] if label(cell) in before]
    require(bool(common), "the two results have no cell in common: measure the same sizes twice")
    for cell in common:
        for name, (phase, repeats) in REPEATS.items():
            if phase in cell and phase in before[label(cell)]:
                past = before[label(cell)][phase][repeats]
                yield compare_figure(label(cell), name, past, cell[phase][repeats])


def read(path: Path) -> dict:
    """A result from its file; UserError if it is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for cell in result["cells"]:
            found = [cell[phase][key] for phase, key in REPEATS.values() if phase in cell]
            good = all(len(times) > 1 and min(times) > 0 for times in found)
            if not (found and good):
                raise ValueError
        return result
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: expected a result of --json") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} is no result of `python -m gpt.bench --json` with two repeats or more"
        ) from None


def differing_settings(old: dict, new: dict) -> list[str]:
    """A line for each circumstance that was not the same."""
    pairs = [(name, old.get(name), new.get(name)) for name in SETTING]
    return [f"{name}: {was} before, {now} after" for name, was, now in pairs if was != now]


def table(changes: Sequence[Change]) -> Table:
    """The changes as a person reads them."""
    drawn = Table(box=SIMPLE, collapse_padding=True, pad_edge=False)
    for name in ("cell", "figure", "new / old", "of pairs, 5 to 95 %", "verdict"):
        drawn.add_column(name, no_wrap=True)
    for c in changes:
        drawn.add_row(c.cell, c.name, f"{c.ratio:.3f}", f"{c.low:.3f} to {c.high:.3f}", c.verdict)
    return drawn


def parse_share(text: str) -> float:
    """`5%` or `0.05` as 0.05; UserError for anything else."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    require(0 <= share < math.inf, f"--fail-if-slower {text}: expected a share such as 5%")
    return share


def too_slow(changes: Sequence[Change], allowed: float) -> list[Change]:
    """Changes that are more than noise, and slower by more than the share `allowed`."""
    return [change for change in changes if change.differs and change.ratio > 1 + allowed]
