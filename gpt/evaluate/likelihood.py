"""Log-likelihoods of many answers given their contexts, batched by length.

A context with several answers is read once, and its cache is forked for each. A context with one
answer is read together with it, in one pass without a cache. Either way, logits are computed only
at the positions that predict an answer's tokens.
Shape letters are those of model/transformer.py, plus P: a row's predicted tokens, C: contexts.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

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

LOGITS_AT_ONCE = 256  # positions; a whole batch's logits would be larger than the model

Request = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation
Context = tuple[int, ...]
Answer = tuple[int, Sequence[int]]  # a request's number and its continuation
Group = tuple[Context, list[Answer]]


class Likelihood(NamedTuple):
    """log p(continuation | context) in nats; `is_greedy`: each token is the likeliest."""

    logprob: float
    is_greedy: bool


def loglikelihoods(
    model, requests: Sequence[Request], batch_size: int
) -> Iterator[dict[int, Likelihood]]:
    """Yield each request's likelihood under a LanguageModel by its number, a batch at a time,
    longest first.

    `batch_size`: continuations per batch. A context that does not fit is cut from the left.
    UserError if a continuation is longer than the model's context, or if the model's output is NaN.
    """
    context_length = model.config.context_length
    answers: dict[Context, list[Answer]] = {}
    for number, (context, continuation) in enumerate(requests):
        room = context_length + 1 - len(continuation)  # the last token is never read
        require(
            room > 0,
            f"an answer has {len(continuation)} tokens, which exceeds the model's context of "
            f"{context_length}: leave out this task, or evaluate a model with a longer context",
        )
        answers.setdefault(tuple(context[-room:]), []).append((number, continuation))

    # Contexts with several answers are read separately; so are long ones, in pieces.
    apart = []
    whole = []
    for context, its_answers in answers.items():
        is_shared = len(its_answers) > 1 and len(context) > 1
        kind = apart if is_shared or len(context) > engine.PIECE else whole
        kind.append((context, its_answers))

    for groups, is_apart in ((apart, True), (whole, False)):
        # Sorting by length saves padding; the longest, which take the most memory, come first.
        groups.sort(key=size, reverse=True)
        for batch in in_batches(groups, batch_size):
            with on_mesh(model.mesh):
                logprobs_RP, is_likeliest_RP = jax.device_get(read(model, batch, is_apart))
            found = {}
            rows = [answer for _, its_answers in batch for answer in its_answers]
            for row, (number, continuation) in enumerate(rows):
                n = len(continuation)
                logprob = float(logprobs_RP[row, :n].sum(dtype=np.float64))
                require_number(logprob, n)
                found[number] = Likelihood(logprob, bool(is_likeliest_RP[row, :n].all()))
            yield found


def size(group: Group) -> tuple[int, int]:
    """The padded length of a context, and the length of its longest answer."""
    context, answers = group
    return padded(len(context)), max(len(continuation) for _, continuation in answers)


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


def padded(n: int) -> int:
    """`n` rounded up to a power of two or three quarters of one, so that few sizes are compiled."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power


def pad(sequences: Sequence[Sequence[int]], least: int = 1) -> np.ndarray:
    """Token ids in rows at least `least` wide, padded on the right and at the end."""
    width = padded(max(least, *map(len, sequences)))
    tokens_RT = np.zeros((padded(len(sequences)), width), np.int32)
    for row, ids in enumerate(sequences):
        tokens_RT[row, : len(ids)] = ids
    return tokens_RT


def read(model, batch: Sequence[Group], is_apart: bool):
    """log p of each answer token, and whether it is the likeliest, both [R, P].

    A row is a context with one answer. If `is_apart`, each context is read once, except for its
    last token, which predicts an answer's first, and a row is an answer on a fork of the cache.
    """
    config, params = model.config, model.params
    rows = []
    first = []  # position in each row that predicts the first token of its answer
    context_of = []
    targets = []
    for number, (context, answers) in enumerate(batch):
        begun = context[-1:] if is_apart else context
        for _, continuation in answers:
            rows.append([*begun, *continuation[:-1]])
            first.append(len(begun) - 1)
            context_of.append(number)
            targets.append(continuation)
    least = 1 if is_apart else engine.SMALLEST_BUCKET
    tokens_RT = pad(rows, least)[:, : config.context_length]
    missing = (0, len(tokens_RT) - len(rows))
    cache = None
    longest_context = padded(max(len(context) for context, _ in batch))
    with compilations.of(batch=len(tokens_RT), bucket=longest_context):
        if is_apart:
            tokens_CT = pad([context[:-1] for context, _ in batch], engine.SMALLEST_BUCKET)
            tokens_CT = tokens_CT[:, : config.context_length]
            n_C = np.ones(len(tokens_CT), np.int32)
            n_C[: len(batch)] = [len(context) - 1 for context, _ in batch]
            cache, _ = engine.prefill_in_pieces(config, params, tokens_CT, n_C)
            cache = engine.grow(cache, padded(cache.capacity + tokens_RT.shape[1]))
            cache = select(cache, np.pad(context_of, missing))
        return score(config, params, cache, tokens_RT, np.pad(first, missing), pad(targets))


select = jax.jit(kv.select)


@partial(jax.jit, static_argnames="config")
def score(config: ModelConfig, params: dict, cache, tokens_RT, first_R, targets_RP):
    """Read rows, on top of a cache if there is one; row r predicts `targets_RP[r]` starting at
    position `first_R[r]`. Returns log p of each target and whether it is the likeliest token."""
    model = transformer.bind(config, params)
    x_RTD, _ = model.hidden(tokens_RT, cache)
    where_RP = first_R[:, None] + jnp.arange(targets_RP.shape[1])
    x_RPD = jnp.take_along_axis(x_RTD, where_RP[..., None], axis=1, mode="clip")

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
