"""What a training step takes of a device's memory, and the largest micro-batch that fits.

Bytes are those of one device. What a step takes is told by XLA, which plans every buffer when it
compiles; nothing is allocated for it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import jax

from gpt import hardware
from gpt.config import TrainConfig
from gpt.errors import UserError, is_out_of_memory, require

MIB, GIB = 2**20, 2**30
ADVICE = "raise --grad-accum, or lower --batch-size, --seq-len, --model.d-model, --model.n-layers"
HALVING = 2  # the guess that is no line's
TRIES = 5  # guesses of the largest micro-batch, each compiled to be sure


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one device that a compiled training step takes."""

    state: float
    """Weights, optimizer and average, and the batch: what the step is given."""
    temporary: float
    """What lives within the step: gradients and activations."""

    @property
    def total(self) -> float:
        """All of it; what the step returns takes the place of what it was given."""
        return self.state + self.temporary


def need_of(compiled: jax.stages.Compiled) -> Need:
    """What XLA has planned for a compiled step, on one device."""
    told = compiled.memory_analysis()
    given = told.argument_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    return Need(given, told.temp_size_in_bytes)


def largest_rows(limit: int, least: int, rows: int, total: Callable[[int], float]) -> int:
    """The largest micro-batch, a multiple of `least` sequences, of which `total` is within `limit`
    bytes; 0 if none is. The search begins at `rows`.

    What a step takes grows about evenly with its rows: a line through two sizes comes close, and
    halving helps where it does not.
    """
    tried = {n: total(n) for n in (least, max(rows, 2 * least))}
    for turn in range(TRIES):
        fits = max((n for n, size in tried.items() if size <= limit), default=0)
        fails = min((n for n, size in tried.items() if size > limit), default=math.inf)
        if fits + least >= fails:
            break
        a, b = (fits, fails) if fails < math.inf else (min(tried), fits)
        slope = (tried[b] - tried[a]) / (b - a)
        guess = a + (limit - tried[a]) / slope if slope > 0 else 2 * fits
        if turn == HALVING and fails < math.inf:
            guess = (fits + fails) / 2
        guess = min(max(int(guess) // least * least, fits + least), fails - least)
        tried[guess] = total(guess)
    return max((n for n, size in tried.items() if size <= limit), default=0)


def require_room(need: Need) -> None:
    """UserError if a step takes more than a device has: on a CPU it would be killed for that."""
    limit, where = hardware.memory()
    require(
        need.total <= limit,
        f"out of memory: a step takes {size(need.total)}, of which weights and optimizer are "
        f"{size(need.state)}, and there are {size(limit)} ({where}): {ADVICE}",
    )


@contextlib.contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Running out of memory inside is a UserError that names the flags to turn."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows = config.batch_size // config.grad_accum
        raise UserError(
            f"out of memory with micro-batches of {rows:,} sequences of {config.window:,} tokens: "
            f"{ADVICE}; --dry-run tells what fits"
        ) from None


def size(n_bytes: float) -> str:
    """Bytes as people read them."""
    return f"{n_bytes / GIB:,.2f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:,.1f} MiB"
