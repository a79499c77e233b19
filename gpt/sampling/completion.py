"""The completion of one prompt as it grows: its tokens, its text, why it ended. Imports no JAX.

A byte-level token may end in the middle of a character; the text that is handed out never does.
What may be the beginning of a stop string is held back until it is clear whether it is one.
"""

import codecs
import math
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpt.errors import require
from gpt.sampling.settings import Settings

NO_TOKEN = -1  # stands where a row gained no token


@dataclass
class Completion:
    """One row of a batch: its prompt, and what has been generated after it so far.

    `prompt_ids`: what the model read, with what stands before the prompt. `logprobs`: the model's
    own, in nats, before bias, temperature and filters. `top`: for each token the likeliest ones at
    its place, (id, the model's own probability), if asked for; also for an end-of-text that was
    sampled. `sample`: the number among the completions of one prompt. `finish_reason`: "stop" (a
    stop string, whose last token is still in `token_ids`), "eos", "length" or "context"; None while
    it grows. `end_id`: the end-of-text that was sampled. `prefill_seconds` and `decode_seconds` are
    those of the whole batch until this row ended, without compilation. `proposed` and `accepted`:
    tokens that speculation guessed, and how many of them were right. `score`: of a text that beam
    search found, see beam_search.py; `sample` is then its rank, 0 the best.
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
    end_id: int | None = field(default=None, repr=False)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    proposed: int = 0
    accepted: int = 0
    score: float | None = None

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


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as text, as its `own_ids`, and as the `ids` that the model reads, which may begin
    with others. `unfinished`: the first bytes of a character in the middle of which the ids end."""

    text: str
    own_ids: list[int]
    ids: list[int]
    unfinished: bytes = b""

    @property
    def checksum(self) -> int:
        """32 bits that depend on every own id, and 0 for none."""
        return zlib.crc32(array("i", self.own_ids).tobytes())


class Row:
    """A completion in progress: `completion` is what users see of it, `prompt` what it continues.

    `text`: decodes its tokens. `window`: what is read of the prompt. `room`: how many tokens it may
    have until the context is full. `hint`: tokens that speculation looks through in addition to the
    row's own.
    """

    def __init__(self, model, prompt: PromptTokens, sample: int, settings: Settings):
        self.prompt = prompt
        self.settings = settings
        self.completion = Completion(prompt.text, prompt.ids, sample, settings.seed)
        self.text = TextStream(model.tokenizer.decode_bytes, settings.stop, prompt.unfinished)
        self.end_ids = model.special_ids.ends
        self.window = prompt.ids
        self.hint: list[int] = []
        # A token may stand at the end of the context, but none after it: it would have no position.
        self.room = model.config.context_length + 1 - len(prompt.ids)
        if settings.on_context_full == "slide":
            self.window = prompt.ids[-model.config.context_length :]
        if settings.on_context_full in ("auto", "slide") and model.config.context_length > 1:
            self.room = math.inf

    @property
    def has_ended(self) -> bool:
        return self.completion.finish_reason is not None

    def add(self, tokens_C, logprobs_C, top_ids_CK=None, top_probs_CK=None) -> str:
        """Append a chunk of C tokens; returns the whole characters that the text gained.

        `top_ids_CK`, `top_probs_CK`: the K likeliest tokens at each place, and the model's own
        probabilities of them, NumPy arrays. Raises UserError where the model gave no numbers.
        """
        done = self.completion
        gained = ""
        for i in np.flatnonzero(tokens_C != NO_TOKEN):
            if self.has_ended:
                break
            token, logprob = int(tokens_C[i]), float(logprobs_C[i])
            require_number(logprob, len(done.token_ids) + 1)
            if top_ids_CK is not None and top_ids_CK.shape[-1] > 0:
                pairs = zip(top_ids_CK[i].tolist(), top_probs_CK[i].tolist(), strict=True)
                done.top.append(list(pairs))
            if token in self.end_ids:
                done.finish_reason = "eos"
                done.end_id = token
                break
            done.token_ids.append(token)
            done.logprobs.append(logprob)
            gained += self.text.push([token])
            if self.text.stopped:
                done.finish_reason = "stop"
            elif len(done.token_ids) == self.settings.max_new_tokens:
                done.finish_reason = "length"
            elif len(done.token_ids) == self.room:
                done.finish_reason = "context"
        if self.has_ended:
            gained += self.text.finish()
            if self.text.stopped:  # perhaps by the last character only
                done.finish_reason = "stop"
        done.text += gained
        return gained


def require_number(logprob: float, token: int) -> None:
    """Raise UserError if the model gave NaN for the token with this number, counted from 1."""
    require(
        not math.isnan(logprob),
        f"the model's output is not a number at token {token}: its training diverged or its "
        "weights are damaged; use another checkpoint",
    )


class TextStream:
    """Decodes the tokens of one row as they come. `stopped`: one of `stops` has been reached.

    `before`: the first bytes of a character that the first token may complete.
    """

    def __init__(
        self,
        decode_bytes: Callable[[Sequence[int]], bytes],
        stops: Sequence[str] = (),
        before: bytes = b"",
    ):
        self.decode_bytes = decode_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoder.decode(before)
        self.stops = stops
        self.held = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The characters that `tokens` complete, without a stop string and what follows it."""
        return self.release(self.decoder.decode(self.decode_bytes(tokens)))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the model stopped in the middle of a character."""
        released = self.release(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return released

    def release(self, text: str) -> str:
        """`text` after what was held back, without a stop string or what may become one.

        Of several matches the one that ends first counts, and of those that end together the
        longest: the result does not depend on how the text was cut into pieces.
        """
        if self.stopped:
            return ""
        text, self.held = self.held + text, ""
        matches = []  # (end, start)
        for stop in self.stops:
            start = text.find(stop)
            if start >= 0:
                matches.append((start + len(stop), start))
        if matches:
            self.stopped = True
            _, start = min(matches)
            return text[:start]

        # Hold back the longest end of the text that is the beginning of a stop string.
        beginnings = [stop[:n] for stop in self.stops for n in range(1, len(stop))]
        n_held = max((len(one) for one in beginnings if text.endswith(one)), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def split_end(data: bytes) -> tuple[str, bytes]:
    """Bytes as text, with U+FFFD for invalid UTF-8, and the bytes of an unfinished character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(data), decoder.getstate()[0]
