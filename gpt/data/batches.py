"""Batches: which tokens a step sees, as a pure function of the seed and the step.

Each epoch cuts the tokens into windows of T+1 at stride T, from its own starting offset, and visits
each window once, in its own order. Nothing is buffered or stored: a keyed permutation gives the
order of just the requested rows, so a run resumes from its step number alone.
This module does not touch files, text or JAX.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from gpt.data.token_files import Mixture, Tokens
from gpt.errors import require

Made = TypeVar("Made")
ROUNDS = 6  # of the Feistel network
PHASE = 2**32 - 1  # used in place of a round's number to get the epoch's offset
BLOCK = 1000  # sequences in which each source of a mixture gets exactly its share


def require_length(tokens: Tokens | Mixture, seq_len: int) -> None:
    """Raise UserError unless one training sequence of `seq_len` tokens fits in each source."""
    for source in tokens.sources if isinstance(tokens, Mixture) else [tokens]:
        require(
            len(source) > seq_len,
            f"the text has {len(source):,} tokens to train on, too few for --seq-len {seq_len}: "
            f"at least {seq_len + 1:,} are needed, so use more text or a smaller --seq-len",
        )


def batch(
    tokens: Tokens | Mixture,
    seed: int,
    index: int,
    batch_size: int,
    seq_len: int,
    rows: slice | np.ndarray = slice(None),
) -> np.ndarray:
    """The sequences of batch `index`, counted from 0: int32 [rows, T+1], holding T inputs and,
    shifted by one, their T targets. Step n of a run, counted from 1, trains on batch n - 1.

    `rows`: which of the `batch_size` rows to return, as a slice or row numbers, for a process that
    holds only those. Raises UserError if the text is shorter than one sequence.
    """
    require_length(tokens, seq_len)
    row = np.arange(batch_size, dtype=np.uint64)[rows]
    sequence = np.uint64(index * batch_size) + row
    if not isinstance(tokens, Mixture):
        return windows(tokens, seed, sequence, seq_len)
    source, turn = draw_sources(tokens.weights, seed, sequence)
    out = np.empty((len(row), seq_len + 1), np.int32)
    for i, one in enumerate(tokens.sources):
        # With the same seed, two sources of the same size would be read in the same order.
        out[source == i] = windows(one, seed + (i << 32), turn[source == i], seq_len)
    return out


def draw_sources(
    weights: list[float], seed: int, sequence: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The source of each of a run's sequences, and the sequence's number within that source.

    Each block of BLOCK sequences has exactly each source's share, in its own order.
    """
    ends = np.round(np.cumsum(weights) * BLOCK).astype(np.uint64)
    starts = np.concatenate([[np.uint64(0)], ends[:-1]])
    block, place = np.divmod(sequence, np.uint64(BLOCK))
    key = mix(mix(np.full_like(block, seed)) ^ ~block)  # ~: unlike any epoch's key
    rank = permute(place, key, BLOCK)
    source = np.searchsorted(ends, rank, "right")
    return source, block * (ends - starts)[source] + rank - starts[source]


def windows(tokens: Tokens, seed: int, sequence: np.ndarray, seq_len: int) -> np.ndarray:
    """The sequences with these numbers, counted from 0 over all epochs: int32 [rows, T+1]."""
    n_windows, n_phases = count_windows(len(tokens), seq_len)
    epoch, place = np.divmod(sequence, np.uint64(n_windows))
    key = mix(mix(np.full_like(epoch, seed)) ^ epoch)
    phase = keyed(key, PHASE, np.zeros_like(key)) % np.uint64(n_phases)
    starts = phase + permute(place, key, n_windows) * np.uint64(seq_len)
    return gather(tokens, starts.astype(np.int64), seq_len)


def count_windows(n_tokens: int, seq_len: int) -> tuple[int, int]:
    """The number of windows in an epoch, and the number of offsets from which that many fit."""
    n_windows = max(1, (n_tokens - seq_len) // seq_len)
    return n_windows, min(seq_len, n_tokens - n_windows * seq_len)


def gather(tokens: Tokens, starts: np.ndarray, seq_len: int) -> np.ndarray:
    """The windows of T+1 tokens starting at `starts`, with zeros after the last token: int32
    [rows, T+1]."""
    out = np.zeros((len(starts), seq_len + 1), np.int32)
    for row, start in zip(out, starts.tolist(), strict=True):
        found = tokens[start : start + seq_len + 1]
        row[: len(found)] = found
    return out


def permute(place: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """The image of each place under a permutation of range(size) chosen by its key: uint64 arrays.

    A Feistel network over pairs of digits in base ceil(sqrt(size)): each round adds to one digit
    modulo the base, which is invertible, so the network is a bijection of range(base * base). The
    few results outside range(size) go through it again until they are inside (cycle walking).
    """
    base = np.uint64(max(1, int(np.ceil(np.sqrt(size)))))
    place = feistel(place, key, base)
    while (place >= size).any():
        place = np.where(place >= size, feistel(place, key, base), place)
    return place


def feistel(place: np.ndarray, key: np.ndarray, base: np.uint64) -> np.ndarray:
    """One pass of the network over range(base * base)."""
    left, right = np.divmod(place, base)
    for number in range(ROUNDS):
        left, right = right, (left + keyed(key, number, right) % base) % base
    return left * base + right


def keyed(key: np.ndarray, number: int, value: np.ndarray) -> np.ndarray:
    """64 pseudorandom bits from `value`, for each key and round."""
    return mix(key ^ mix(value ^ np.uint64(number << 32)))


def mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's step: flipping any input bit changes about half of the output bits."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def evaluation_windows(
    tokens: Tokens, seq_len: int, max_tokens: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The windows an evaluation reads: int32 [B, T+1] tokens and float32 [B, T] target weights.

    If `max_tokens` is 0 or covers all tokens, every token but the first is a target of weight 1
    exactly once; otherwise evenly spread whole windows are taken. Weight 0 marks targets already
    counted and the last batch's padding, so that all batches have the same shape.
    """
    n_targets = len(tokens) - 1
    n_whole = n_targets // seq_len
    first = np.arange(0, n_targets, seq_len)  # the first target that each window counts
    if 0 < max_tokens < n_targets and n_whole:
        n_chosen = max(1, min(max_tokens // seq_len, n_whole))
        first = np.arange(n_chosen) * n_whole // n_chosen * seq_len
    # The last window is moved back until it fits.
    starts = np.minimum(first, max(n_targets - seq_len, 0))
    for i in range(0, len(starts), batch_size):
        chosen = slice(i, i + batch_size)
        target = starts[chosen, None] + np.arange(seq_len)
        is_counted = (target >= first[chosen, None]) & (target < n_targets)
        missing = ((0, batch_size - len(target)), (0, 0))
        rows = gather(tokens, starts[chosen], seq_len)
        yield np.pad(rows, missing), np.pad(is_counted.astype(np.float32), missing)


def prefetch(make: Callable[[int], Made], first: int, end: int, depth: int = 2) -> Iterator[Made]:
    """Yield make(index) for each index in range(first, end).

    A background thread keeps `depth` results ready; an exception in it is raised here when its
    index is due. Closing the generator ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead = range(first, end)
    waiting = deque(pool.submit(make, index) for index in ahead[:depth])
    try:
        for index in ahead:
            made = waiting.popleft().result()
            if index + depth < end:
                waiting.append(pool.submit(make, index + depth))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
