"""What has been drawn so far for each row of a batch, as tokens and as text. Knows no device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt.sampling.settings import Settings
from gpt.sampling.text import TextStream

NO_TOKEN = -1  # stands where a row drew none


@dataclass
class Completion:
    """One row: its prompt, and what has been drawn after it so far.

    `logprobs`: the model's own, in nats, before temperature and filters. `finish_reason`: "eos",
    "length" or "context" (None while it runs). `prefill_seconds` and `decode_seconds` are those of
    the whole batch until this row ended, compilation left out.
    """

    prompt: str
    sample: int
    seed: int
    eot: int = field(repr=False)
    most: int = field(repr=False)  # tokens that it may have
    allowed: int = field(repr=False)  # tokens until the context is full
    stream: TextStream = field(repr=False)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @classmethod
    def blank(cls, model, prompt: str, n_tokens: int, sample: int, settings: Settings):
        """Nothing drawn yet after `prompt`, which has `n_tokens` tokens.

        A token may be drawn at the context's end, but none after it: it would have no position.
        """
        allowed = model.config.context_length + 1 - n_tokens
        most, eot = settings.max_new_tokens, model.tokenizer.eot_token
        stream = TextStream(model.tokenizer.decode_bytes)
        return cls(prompt, sample, settings.seed, eot, most, allowed, stream)

    def record(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Append a chunk of what was drawn; the whole characters that the text gained."""
        drawn = [(int(t), float(p)) for t, p in zip(tokens, logprobs, strict=True) if t != NO_TOKEN]
        new = [pair for pair in drawn if pair[0] != self.eot]
        self.token_ids += [token for token, _ in new]
        self.logprobs += [logprob for _, logprob in new]
        if len(new) < len(drawn):
            self.finish_reason = "eos"
        elif len(self.token_ids) == self.most:
            self.finish_reason = "length"
        elif len(self.token_ids) == self.allowed:
            self.finish_reason = "context"
        gained = self.stream.push([token for token, _ in new])
        gained += self.stream.finish() if self.finish_reason else ""
        self.text += gained
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
