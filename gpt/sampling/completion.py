"""One prompt's completion as it grows: tokens, text and why it ended. Imports no JAX.

A byte-level token may end in the middle of a character; emitted text never does. Text that may
begin a stop string is held back until it is clear whether it does.
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

NO_TOKEN = -1  # marks places where a row gained no token


@dataclass
class Completion:
    """One row of a batch: its prompt and what has been generated so far.

    `prompt_ids`: what the model read, including any prefix. `logprobs`: the model's own, in nats,
    before bias, temperature and filters. `top`: if requested, the likeliest tokens at each step as
    (id, the model's own probability), including the step that sampled end-of-text. `sample`: the
    index among the prompt's completions. `finish_reason`: "stop" (a stop string, whose last token
    is still in `token_ids`), "eos", "length" or "context"; None while it grows. `end_id`: the
    sampled end-of-text id. `prefill_seconds` and `decode_seconds` are the whole batch's until this
    row ended, excluding compilation. `proposed` and `accepted`: how many tokens speculation
    proposed, and how many of them were right. `score`: set by beam search (see beam_search.py);
    `sample` is then the rank, 0 being the best.
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
        """This row's tokens per second of decoding; the first token belongs to the prefill."""
        n_decoded = len(self.token_ids) - 1
        if n_decoded <= 0 or not self.decode_seconds:
            return None
        return n_decoded / self.decode_seconds

    def __str__(self) -> str:
        return self.prompt + self.text


@dataclass(frozen=True)
class Piece:
    """Text that a completion has just gained, in whole characters. `row`: its row in the batch."""

    row: int
    text: str
    completion: Completion


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as text, as its `own_ids`, and as the `ids` that the model reads, which may start
    with a prefix. `unfinished`: the bytes of an incomplete character at the end of the ids."""

    text: str
    own_ids: list[int]
    ids: list[int]
    unfinished: bytes = b""

    @property
    def checksum(self) -> int:
        """CRC-32 of the own ids; 0 if there are none."""
        return zlib.crc32(array("i", self.own_ids).tobytes())


class Row:
    """A completion in progress: `completion` is what users see, `prompt` what it continues.

    `text` decodes its tokens. `window`: the part of the prompt to read. `room`: how many tokens it
    may gain before the context is full. `hint`: extra tokens for speculation to search.
    """

    def __init__(self, model, prompt: PromptTokens, sample: int, settings: Settings):
        self.prompt = prompt
        self.settings = settings
        self.completion = Completion(prompt.text, prompt.ids, sample, settings.seed)
        self.text = TextStream(model.tokenizer.decode_bytes, settings.stop, prompt.unfinished)
        self.end_ids = model.special_ids.ends
        self.window = prompt.ids
        self.hint: list[int] = []
        # One more token can follow a full context, but it has no position, so nothing follows it.
        self.room = model.config.context_length + 1 - len(prompt.ids)
        if settings.on_context_full == "slide":
            self.window = prompt.ids[-model.config.context_length :]
        if settings.on_context_full in ("auto", "slide") and model.config.context_length > 1:
            self.room = math.inf

    @property
    def has_ended(self) -> bool:
        return self.completion.finish_reason is not None

    def add(self, tokens_C, logprobs_C, top_ids_CK=None, top_probs_CK=None) -> str:
        """Append a chunk of C tokens; return the whole characters that the text gained.

        `top_ids_CK`, `top_probs_CK`: NumPy arrays of the K likeliest tokens at each place and the
        model's own probabilities of them. Raises UserError if the model's output is NaN.
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
            if self.text.stopped:  # perhaps only by the last character
                done.finish_reason = "stop"
        done.text += gained
        return gained


def require_number(logprob: float, token: int) -> None:
    """Raise UserError if the model gave NaN for the `token`-th token, counting from 1."""
    require(
        not math.isnan(logprob),
        f"the model's output is not a number at token {token}: its training diverged or its "
        "weights are damaged; use another checkpoint",
    )


class TextStream:
    """Decodes one row's tokens as they arrive. `stopped`: whether one of `stops` was reached.

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
        """The characters completed by `tokens`, up to any stop string."""
        return self.release(self.decoder.decode(self.decode_bytes(tokens)))

    def finish(self) -> str:
        """The remaining text, with U+FFFD if the model stopped in the middle of a character."""
        released = self.release(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return released

    def release(self, text: str) -> str:
        """The held text plus `text`, up to any stop string and without what may become one.

        The match that ends first wins, then the longest, so the result does not depend on how the
        text was split into pieces.
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

        # Hold back the longest suffix of the text that begins a stop string.
        beginnings = [stop[:n] for stop in self.stops for n in range(1, len(stop))]
        n_held = max((len(one) for one in beginnings if text.endswith(one)), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def split_end(data: bytes) -> tuple[str, bytes]:
    """`data` as text, with U+FFFD for invalid UTF-8, and the bytes of an unfinished character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(data), decoder.getstate()[0]
