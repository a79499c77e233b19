"""Curves and their scales: thinned, smoothed, ticked. Knows neither HTML nor runs."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

BUCKETS = 600  # of a thinned curve: each keeps its least and its largest value
MOST_MARKS = 200
LOG_FROM = 40.0  # largest over median, from which on a scale is logarithmic


@dataclass(frozen=True)
class Curve:
    """One line of a panel. `kind`: "curve", "raw" (faint, behind), or "held" (dashed, dotted).

    `run`: whose colour it has. `label`: what it is among several of one run.
    """

    run: int
    label: str
    steps: np.ndarray
    values: np.ndarray
    kind: str = "curve"


@dataclass(frozen=True)
class Panel:
    """A picture: curves over steps. `skips`, `restarts`: (run, step) of what happened then."""

    name: str
    title: str
    unit: str
    curves: list[Curve]
    skips: list[tuple[int, int]] = field(default_factory=list)
    restarts: list[tuple[int, int]] = field(default_factory=list)

    @cached_property
    def log(self) -> bool:
        """Whether the scale is logarithmic."""
        return spread_out(np.concatenate([curve.values for curve in self.curves]))

    @cached_property
    def reach(self) -> tuple[float, float]:
        """The least and the largest value drawn, with a margin."""
        values = np.concatenate([curve.values for curve in self.curves])
        low, high = float(values.min()), float(values.max())
        if self.log:
            return low / 1.1, high * 1.1
        margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        return max(low - margin, 0.0) if low >= 0 else low - margin, high + margin

    @cached_property
    def last(self) -> float:
        """The last step drawn."""
        return float(max((curve.steps[-1] for curve in self.curves), default=0)) or 1.0

    def across(self, steps: np.ndarray) -> np.ndarray:
        """Steps as shares of the width."""
        return np.asarray(steps, float) / self.last

    def up(self, values: np.ndarray) -> np.ndarray:
        """Values as shares of the height."""
        bend = np.log if self.log else np.asarray
        low, high = bend(np.array(self.reach))
        return (bend(np.asarray(values, float)) - low) / (high - low)


def thin(steps: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most 2 x BUCKETS points, none of whose peaks is lost."""
    x, y = np.asarray(steps), np.asarray(values, float)
    if len(x) <= 2 * BUCKETS:
        return x, y
    edges = np.linspace(0, len(x), BUCKETS + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in pairwise(edges.tolist()):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    index = np.array(sorted(kept))
    return x[index], y[index]


def evenly(steps: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """A smooth curve of at most BUCKETS points, its ends among them."""
    index = np.unique(np.linspace(0, len(steps) - 1, BUCKETS).astype(int))
    return np.asarray(steps)[index], np.asarray(values)[index]


def smooth(values: list[float]) -> np.ndarray:
    """The mean over a twentieth of `values` around each: narrower at the ends, so never late.

    As `runlog.smoothed`, which is slow for as many values as a report may have. Values that want
    a logarithmic scale have their geometric mean: no peak becomes a plateau.
    """
    values = np.asarray(values, float)
    if spread_out(values):
        return np.exp(mean_around(np.log(values)))
    return mean_around(values)


def mean_around(values: np.ndarray) -> np.ndarray:
    """The mean of `values` in a window around each, by one running sum."""
    n, i = len(values), np.arange(len(values))
    reach = np.minimum(np.minimum(i, n - 1 - i), n // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)


def spread_out(values: np.ndarray) -> bool:
    """Whether a few large values would leave the others no room on a linear scale."""
    return bool(values.min() > 0 and values.max() > LOG_FROM * np.median(values))


def ticks(low: float, high: float, log: bool, whole: bool = False) -> list[float]:
    """Round numbers between two others, for the labels of an axis: `whole` ones for steps."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    steps = [1, 2, 2.5, 5, 10]
    even = MaxNLocator(nbins=5, steps=steps, integer=whole)
    locator = LogLocator(subs=(1, 3)) if log else even
    found = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    return [float(tick) for tick in found[:: max(1, round(len(found) / 6))]]


def tell(value: float) -> str:
    """A number in few characters, as a label or a reading has it."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e3:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.4g}"
