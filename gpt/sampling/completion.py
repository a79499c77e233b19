"""The completion of one prompt as it grows: its tokens, its text, why it ended. Uses no device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt.errors import require
from gpt.sampling.settings import Settings
from gpt.sampling.text_stream import TextStream

NO_TOKEN = -1  # stands where a row gained no token


@dataclass
class Completion:
    """One row of a batch: its prompt, and what has been generated after it so far.

    `logprobs`: the model's own, in nats, before bias, temperature and filters. `top`: for each
    token the likeliest ones at its place, (id, the model's own probability), if asked for; also for
    an end-of-text that was sampled. `sample`: the number among the completions of one prompt.
    `finish_reason`: "stop" (a stop string, whose last token is still in `token_ids`), "eos",
    "length" or "context"; None while it grows. `prefill_seconds` and `decode_seconds` are those of
    the whole batch until this row ended, without compilation.
    """

    prompt: str
    prompt_ids: list[int] = field(repr=False)
    sample: int
    seed: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list, repr=False)
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of this row per second of decoding; the first token belongs to the prefill."""
        n_decoded = len(self.token_ids) - 1
        if n_decoded <= 0 or not self.decode_seconds:
            return None
        return n_decoded / self.decode_seconds

    def __str__(self) -> str:
        return self.prompt + self.text


@dataclass(frozen=True)
class Piece:
    """Text that one completion has just gained, whole characters only. `row`: of the batch."""

    row: int
    text: str
    completion: Completion


class Row:
    """A completion in progress: `completion` is what users see of it, `prompt` what it continues.

    `text`: decodes its tokens. `max_tokens`: how many it may have. `room`: how many until the
    context is full.
    """

    def __init__(self, model, prompt: "PromptTokens", sample: int, settings: Settings):
        self.prompt = prompt
        self.completion = Completion(prompt.text, prompt.ids, sample, settings.seed)
        self.text = TextStream(model.tokenizer.decode_bytes, settings.stop, prompt.unfinished)
        self.eot = model.tokenizer.eot_token
        self.max_tokens = settings.max_new_tokens
        # A token may stand at the end of the context, but none after it: it would have no position.
        self.room = model.config.context_length + 1 - len(prompt.ids)
        if settings.on_context_full == "slide":
            self.room = math.inf

    @property
    def has_ended(self) -> bool:
        return self.completion.finish_reason is not None

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], top: Sequence = ()) -> str:
        """Append a chunk of what was generated; returns the whole characters that the text gained.

        `top`: for each token, pairs of an id and a probability. Raises UserError where the model
        gave no numbers.
        """
        done = self.completion
        gained = ""
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if token == NO_TOKEN or self.has_ended:
                break
            require_number(logprob, len(done.token_ids) + 1)
            if len(top) and top[i]:
                done.top.append(top[i])
            gained += self._add_token(int(token), float(logprob))
        if self.has_ended:
            gained += self.text.finish()
            if self.text.stopped:  # perhaps by the last character only
                done.finish_reason = "stop"
        done.text += gained
        return gained

    def _add_token(self, token: int, logprob: float) -> str:
        """Append one token, and note if it is the last; returns the characters it completes."""
        done = self.completion
        if token == self.eot:
            done.finish_reason = "eos"
            return ""
        done.token_ids.append(token)
        done.logprobs.append(logprob)
        gained = self.text.push([token])
        if self.text.stopped:
            done.finish_reason = "stop"
        elif len(done.token_ids) == self.max_tokens:
            done.finish_reason = "length"
        elif len(done.token_ids) == self.room:
            done.finish_reason = "context"
        return gained


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as text and as token ids. `unfinished`: the first bytes of a character in the middle
    of which the ids end."""

    text: str
    ids: list[int]
    unfinished: bytes = b""


def require_number(logprob: float, token: int) -> None:
    """Raise UserError if the model gave NaN for the token with this number, counted from 1."""
    require(
        not math.isnan(logprob),
        f"the model's output is not a number at token {token}: its training diverged or its "
        "weights are damaged; use another checkpoint",
    )
