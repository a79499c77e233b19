"""What has been drawn so far for each row of a batch, as tokens and as text. Knows no device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt.errors import require
from gpt.sampling.settings import Settings
from gpt.sampling.text_stream import TextStream

NO_TOKEN = -1  # stands where a row drew none


def require_number(logprob: float, token: int) -> None:
    """UserError if the model gave NaN for its token of this number, the first being 1."""
    require(
        not math.isnan(logprob),
        f"the model's output is not a number at token {token}: its training diverged or its "
        f"weights are damaged; take another checkpoint",
    )


@dataclass
class Completion:
    """One row: its prompt, and what has been drawn after it so far.

    `logprobs`: the model's own, in nats, before bias, temperature and filters. `top`: for each
    token the likeliest ones at its place, (id, the model's own probability), where asked for; also
    for an end-of-text that was drawn.
    `finish_reason`: "stop" (a stop string, whose last token is still in `token_ids`), "eos",
    "length" or "context" (None while it runs). `prefill_seconds` and `decode_seconds` are those of
    the whole batch until this row ended, compilation left out.
    """

    prompt: str
    prompt_ids: list[int] = field(repr=False)
    sample: int
    seed: int
    eot: int = field(repr=False)
    most: int = field(repr=False)  # tokens that it may have
    allowed: float = field(repr=False)  # tokens until the context is full
    stream: TextStream = field(repr=False)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list, repr=False)
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @classmethod
    def blank(cls, model, prompt: str, ids: list[int], sample: int, settings: Settings, before=b""):
        """Nothing drawn yet after `prompt`, whose tokens are `ids`.

        `before`: the first bytes of a character that the prompt breaks off in.

        A token may be drawn at the context's end, but none after it: it would have no position.
        """
        room = model.config.context_length + 1 - len(ids)
        allowed = math.inf if settings.on_context_full == "slide" else room
        most, eot = settings.max_new_tokens, model.tokenizer.eot_token
        stream = TextStream(model.tokenizer.decode_bytes, settings.stop, before)
        return cls(prompt, ids, sample, settings.seed, eot, most, allowed, stream)

    def record(self, tokens: Sequence[int], logprobs: Sequence[float], top: Sequence = ()) -> str:
        """Append a chunk of what was drawn; the whole characters that the text gained.

        `top`: for each token, pairs. UserError where the model gave no probabilities.
        """
        gained = ""
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if token == NO_TOKEN or self.finish_reason:
                break
            require_number(logprob, len(self.token_ids) + 1)
            gained += self.take(int(token), float(logprob), top[i] if len(top) else [])
        if self.finish_reason:
            gained += self.stream.finish()  # whose last character may complete a stop string
            self.finish_reason = "stop" if self.stream.stopped else self.finish_reason
        self.text += gained
        return gained

    def take(self, token: int, logprob: float, top: list) -> str:
        """Append one token, end if it is the last; the characters that it completes."""
        self.top += [top] if top else []
        if token == self.eot:
            self.finish_reason = "eos"
            return ""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        gained = self.stream.push([token])
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.most:
            self.finish_reason = "length"
        elif len(self.token_ids) == self.allowed:
            self.finish_reason = "context"
        return gained

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of this row per second of decoding; the first token is the prefill's."""
        decoded = len(self.token_ids) - 1
        return decoded / self.decode_seconds if decoded > 0 and self.decode_seconds else None

    def __str__(self) -> str:
        return self.prompt + self.text


@dataclass(frozen=True)
class Piece:
    """Text that one completion has just gained, whole characters only."""

    row: int
    text: str
    completion: Completion
