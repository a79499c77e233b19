"""Log-likelihoods of answers after their contexts, for many of them, batched by length.

A context with several answers is read once, and its cache is forked for them. A context with one
answer is read together with it, in one pass without a cache. Either way logits are computed only at
the positions that predict the tokens of an answer.
Shape letters: see model/transformer.py; here P are the predicted tokens of a row, C contexts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt.compile_log import compilations
from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model import kv_cache as kv
from gpt.model import transformer
from gpt.sampling import engine, sampler, scoring
from gpt.sampling.completion import require_number
from gpt.sharding import on_mesh

LOGITS_AT_ONCE = 256  # positions: the logits of a whole batch would be larger than the model

Request = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of what follows it
Context = tuple[int, ...]
Answer = tuple[int, Sequence[int]]  # the number of a request, and what follows its context
Group = tuple[Context, list[Answer]]


@dataclass(frozen=True)
class Likelihood:
    """log p(continuation | context) in nats; `is_greedy`: each of its tokens is the likeliest."""

    logprob: float
    is_greedy: bool


def loglikelihoods(
    model, requests: Sequence[Request], batch_size: int
) -> Iterator[dict[int, Likelihood]]:
    """The likelihood of each request under a LanguageModel, by its number: a batch at a time, the
    longest first.

    `batch_size`: continuations read together. A context that does not fit is cut from the left, see
    `cut`. UserError for a continuation longer than the model's context, or where the model gives no
    numbers.
    """
    answers: dict[Context, list[Answer]] = {}
    for number, (context, continuation) in enumerate(requests):
        kept = cut(context, continuation, model.config.context_length)
        answers.setdefault(tuple(kept), []).append((number, continuation))

    # A context with several answers is read apart; so is a long one, which is read in pieces.
    apart = []
    whole = []
    for context, its_answers in answers.items():
        is_shared = len(its_answers) > 1 and len(context) > 1
        kind = apart if is_shared or len(context) > engine.PIECE else whole
        kind.append((context, its_answers))

    for groups, read in ((apart, read_contexts_apart), (whole, read_whole)):
        # Sorting by length saves padding; the longest come first and take the most memory.
        groups.sort(key=lambda group: (padded(len(group[0])), longest(group)), reverse=True)
        for batch in in_batches(groups, batch_size):
            with on_mesh(model.mesh):
                logprobs_RP, is_likeliest_RP = jax.device_get(read(model, batch))
            found = {}
            for row, (number, continuation) in enumerate(rows_of(batch)):
                n = len(continuation)
                logprob = float(logprobs_RP[row, :n].sum(dtype=np.float64))
                require_number(logprob, n)
                found[number] = Likelihood(logprob, bool(is_likeliest_RP[row, :n].all()))
            yield found


def cut(context: Sequence[int], continuation: Sequence[int], context_length: int) -> Sequence[int]:
    """The end of a context that fits before a continuation. (Its last token is never read.)"""
    require(
        len(continuation) <= context_length,
        f"an answer has {len(continuation)} tokens, which exceeds the model's context of "
        f"{context_length}: leave out this task, or evaluate a model with a longer context",
    )
    room = context_length + 1 - len(continuation)
    return context[-room:]


def longest(group: Group) -> int:
    """Tokens of the longest answer of a context."""
    return max(len(continuation) for _, continuation in group[1])


def in_batches(groups: Sequence[Group], batch_size: int) -> Iterator[list[Group]]:
    """Consecutive groups with up to `batch_size` answers in all, or a single group with more."""
    batch = []
    n_rows = 0
    for group in groups:
        if batch and n_rows + len(group[1]) > batch_size:
            yield batch
            batch = []
            n_rows = 0
        batch.append(group)
        n_rows += len(group[1])
    if batch:
        yield batch


def rows_of(batch: Sequence[Group]) -> list[Answer]:
    """The answers of a batch, row by row."""
    return [answer for _, its_answers in batch for answer in its_answers]


def padded(n: int) -> int:
    """`n` rounded up to a power of two or to three quarters of one: few enough sizes to compile a
    program for each."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power


def pad(sequences: Sequence[Sequence[int]], least: int = 1) -> np.ndarray:
    """Token ids as rows of at least `least`, padded on the right, and with rows at the end."""
    width = padded(max(least, *map(len, sequences)))
    tokens_RT = np.zeros((padded(len(sequences)), width), np.int32)
    for row, ids in enumerate(sequences):
        tokens_RT[row, : len(ids)] = ids
    return tokens_RT


def read_contexts_apart(model, batch: Sequence[Group]):
    """Read each context of a batch once, but for its last token, which predicts the first of an
    answer; then the answers on forks of its cache. Returns what `predictions` does."""
    config, params = model.config, model.params
    tokens_CT = pad([context[:-1] for context, _ in batch], engine.SMALLEST_BUCKET)
    tokens_CT = tokens_CT[:, : config.context_length]
    n_C = np.ones(len(tokens_CT), np.int32)
    n_C[: len(batch)] = [len(context) - 1 for context, _ in batch]

    inputs = []
    row_R = []
    for number, (context, its_answers) in enumerate(batch):
        for _, continuation in its_answers:
            inputs.append([context[-1], *continuation[:-1]])
            row_R.append(number)
    tokens_RP = pad(inputs)
    targets_RP = pad([continuation for _, continuation in rows_of(batch)])
    row_R = np.pad(row_R, (0, len(tokens_RP) - len(row_R)))

    with compilations.of(batch=len(tokens_RP), bucket=tokens_CT.shape[1]):
        cache, _ = engine.prefill_in_pieces(config, params, tokens_CT, n_C)
        capacity = padded(cache.capacity + tokens_RP.shape[1])
        cache = engine.grow(cache, capacity)
        return score_after(config, params, cache, row_R, tokens_RP, targets_RP)


def read_whole(model, batch: Sequence[Group]):
    """Read each context of a batch together with its answer. Returns what `predictions` does."""
    rows = []
    first_R = []
    targets = []
    for context, its_answers in batch:
        for _, continuation in its_answers:
            rows.append([*context, *continuation[:-1]])
            first_R.append(len(context) - 1)
            targets.append(continuation)
    tokens_RT = pad(rows, engine.SMALLEST_BUCKET)[:, : model.config.context_length]
    first_R = np.pad(first_R, (0, len(tokens_RT) - len(first_R)))
    with compilations.of(batch=len(tokens_RT), bucket=tokens_RT.shape[1]):
        return score_whole(model.config, model.params, tokens_RT, first_R, pad(targets))


@partial(jax.jit, static_argnames="config")
def score_whole(config: ModelConfig, params: dict, tokens_RT, first_R, targets_RP):
    """Read whole rows, of which row r predicts `targets_RP[r]` from position `first_R[r]` on: see
    `predictions`."""
    model = transformer.bind(config, params)
    x_RTD, _ = model.hidden(tokens_RT)
    where_RP = first_R[:, None] + jnp.arange(targets_RP.shape[1])
    x_RPD = jnp.take_along_axis(x_RTD, where_RP[..., None], axis=1, mode="clip")
    return predictions(model, x_RPD, targets_RP)


@partial(jax.jit, static_argnames="config")
def score_after(config: ModelConfig, params: dict, cache, row_R, tokens_RP, targets_RP):
    """Read tokens on top of the rows `row_R` of a cache that has room for them; each predicts a
    target: see `predictions`."""
    model = transformer.bind(config, params)
    x_RPD, _ = model.hidden(tokens_RP, kv.select(cache, row_R))
    return predictions(model, x_RPD, targets_RP)


def predictions(model: transformer.GPT, x_RPD: jax.Array, targets_RP: jax.Array):
    """log p of each target, and whether it is the likeliest token, both [R, P]."""

    def predict(position):
        x_D, target = position
        logits_1V = model.unembed(x_D[None])
        logprob_1 = sampler.token_logprob(logits_1V, target[None])
        return logprob_1[0], logits_1V[0].argmax() == target

    positions = x_RPD.reshape(-1, x_RPD.shape[-1]), targets_RP.ravel()
    found = jax.lax.map(predict, positions, batch_size=LOGITS_AT_ONCE)
    return jax.tree.map(lambda found_M: found_M.reshape(targets_RP.shape), found)


def rolling_loglikelihood(model, ids: Sequence[int]) -> float:
    """log p of all `ids` but the first, in nats.

    Windows of the model's whole context predict each token once. The last window ends with the text
    and overlaps the one before it, as in the harness.
    """
    n = len(ids) - 1
    width = model.config.context_length
    n_whole = n // width * width
    logprobs = np.empty(n)
    with on_mesh(model.mesh):
        if n_whole > 0:
            logprobs[:n_whole] = scoring.score_ids(model, ids[: n_whole + 1], width, width)
        if n > n_whole:
            rest = scoring.score_ids(model, ids[max(0, n - width) :], width, width)
            logprobs[n_whole:] = rest[n_whole - n :]
    require_number(logprobs.sum(), n)
    return float(logprobs.sum())
