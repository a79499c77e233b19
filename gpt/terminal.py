"""Terminal input and output of sample.py.

Safe text, JSON, text files, typed lines and deferred Ctrl-C. Like cli.py, this file is for entry
points only and imports no JAX.
"""

import contextlib
import json
import math
import os
import re
import signal
import stat
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt.errors import UserError, require
from gpt.wording import counted

# Characters that move the cursor, change colours, or clear or reorder text: C0 except newline and
# tab, DEL, C1, and the overrides and isolates that can disguise text (Unicode Bidirectional
# Algorithm, 2.2-2.5).
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SHOWN_TOKENS = 1000  # of a scored text
TIMING = "compilation is left out; the first completion of a process includes its start-up"


# Text to standard output.


def visible(text: str) -> str:
    """`text` with terminal control characters escaped, as in `\\x1b`."""
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def write(text: str) -> None:
    """Write `text` to standard output and flush; control characters are escaped on a terminal."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line to standard error."""
    print(text, file=sys.stderr)


class InOrder:
    """Prints a batch's completions one after the other, in whatever order their text arrives.

    The current row streams while later ones are buffered; when it ends, the next row's buffer is
    printed and that row streams.
    """

    def __init__(self, n_rows: int):
        self.n_rows = n_rows
        self.current = 0
        self.waiting: dict[int, str] = {}
        self.ended: set[int] = set()
        self.in_line = False  # whether the last text printed left a line open

    def add(self, row: int, text: str, ended: bool) -> None:
        """Add `text` to `row`, which may have `ended`, and print what is next in order."""
        self.waiting[row] = self.waiting.get(row, "") + text
        if ended:
            self.ended.add(row)
        while self.current < self.n_rows:
            self._show(self.waiting.pop(self.current, ""))
            if self.current not in self.ended:
                break
            self.current += 1

    def flush(self, end_line: bool) -> None:
        """After an interruption, print the buffered rows that have ended, on a new line.
        `end_line`: end the current line even if there are none."""
        kept = "".join(text for row, text in sorted(self.waiting.items()) if row in self.ended)
        self.waiting = {}
        if self.in_line and (end_line or kept):
            self._show("\n")
        self._show(kept)

    def _show(self, text: str) -> None:
        if text:
            write(text)
            self.in_line = not text.endswith("\n")


# Completions as text and as JSON.


class CompletionText:
    """Turns each piece of a batch of completions into the text to print: the prompt and its
    continuation, or tables of the `top` likeliest tokens if `top` is above 0, under a header if
    there are several completions. `as_json`: one line of JSON when a completion ends."""

    def __init__(self, n_prompts: int, n_samples: int, top: int, tokenizer, as_json: bool):
        self.n_samples = n_samples
        self.several = n_prompts * n_samples > 1
        self.top = top
        self.tokenizer = tokenizer
        self.as_json = as_json
        self.n_shown: dict[int, int] = {}  # tables shown so far for each row

    def __call__(self, piece) -> str:
        completion = piece.completion
        if self.as_json:
            return completion_json(completion, self.top > 0) if completion.finish_reason else ""

        text = ""
        if piece.row not in self.n_shown:
            self.n_shown[piece.row] = 0
            if self.several:
                prompt, sample = divmod(piece.row, self.n_samples)
                score = "" if completion.score is None else f", score {completion.score:.4f}"
                text += f"--- prompt {prompt + 1}, sample {sample + 1}{score} ---\n"
            if not self.top:
                text += completion.prompt
        if self.top:
            text += probability_tables(completion, self.n_shown[piece.row], self.tokenizer)
            self.n_shown[piece.row] = len(completion.top)
        else:
            text += piece.text
        if completion.finish_reason:
            if self.top:
                text += str(completion)
            text += "\n\n" if self.several else "\n"
        return text


def spell(token: bytes) -> str:
    """The token's repr, as bytes if it is not valid UTF-8."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def probability_tables(completion, first: int, tokenizer) -> str:
    """Tables of the likeliest tokens at each step from `first` on; * marks the chosen one."""
    chosen = list(completion.token_ids)
    if completion.finish_reason == "eos":
        chosen.append(completion.end_id)
    text = ""
    for step in range(first, len(chosen)):
        text += f"step {step}\n" if step else "after prefill\n"
        rows = [(token, f"{p:9.4%}") for token, p in completion.top[step]]
        if chosen[step] not in dict(rows):
            if step < len(completion.logprobs):
                p = f"{math.exp(completion.logprobs[step]):9.4%}"
            else:
                # End-of-text's probability is not kept; it is at most the last one shown.
                p = f"<={rows[-1][1].strip()}"
            rows.append((chosen[step], p))
        for token, p in rows:
            mark = "*" if token == chosen[step] else " "
            text += f"  {mark} {p}  {spell(tokenizer.decode_bytes([token]))}\n"
    return text


def scored_tokens(score, tokenizer) -> Iterator[str]:
    """A line with log-probability and spelling for each of the first SHOWN_TOKENS tokens of a
    scored text."""
    tokens = list(zip(score.token_ids, score.logprobs, strict=True))
    for token, logprob in tokens[:SHOWN_TOKENS]:
        yield f"{logprob:9.4f}  {spell(tokenizer.decode_bytes([token]))}"
    if len(tokens) > SHOWN_TOKENS:
        yield f"... and {len(tokens) - SHOWN_TOKENS:,} more tokens; --json prints them all"


def completion_json(completion, with_top: bool) -> str:
    """A completion as a line of JSON."""
    names = "prompt text token_ids logprobs finish_reason prefill_seconds decode_seconds"
    names += " tokens_per_second seed sample proposed accepted"
    values = {name: getattr(completion, name) for name in names.split()} | {"timing": TIMING}
    if with_top:
        values["top"] = completion.top
    if completion.score is not None:
        values["score"] = completion.score
    return json.dumps(values) + "\n"


def describe_end(completions: Sequence, context_length: int, speculates: bool = False) -> str:
    """Prefill and decode times, why the completions ended, and how to get more. `speculates`: also
    how many proposed tokens were accepted."""
    slowest = max(completions, key=lambda completion: completion.decode_seconds)
    counts = Counter(completion.finish_reason or "Ctrl-C" for completion in completions)
    line = f"prefill {slowest.prefill_seconds * 1e3:.1f} ms, decode {slowest.decode_seconds:.2f} s"
    if slowest.tokens_per_second:
        line += f", {slowest.tokens_per_second:.0f} tokens/s per row"
    if speculates:
        n_proposed = sum(completion.proposed for completion in completions)
        n_accepted = sum(completion.accepted for completion in completions)
        if n_proposed > 0:
            line += f", {n_accepted} of {n_proposed} proposed tokens accepted"
        else:
            line += ", 0 tokens proposed because too few would have been right"
    reasons = [f"{reason} ({n} times)" if n > 1 else reason for reason, n in counts.items()]
    line += f" (compilation excluded); stopped by {', '.join(reasons)}"
    if "length" in counts:
        line += "; --max-new-tokens for more"
    if "context" in counts:
        line += f"; the model's context of {context_length} tokens is full"
    # The model never reads the last token.
    longest = max(len(one.prompt_ids) + len(one.token_ids) - 1 for one in completions)
    if longest > context_length:
        fewest = context_length - context_length // 2
        line += (
            f"\nnote: the text is longer than the model's context of {context_length} tokens, so "
            f"the model saw only the last {fewest} to {context_length} of them at a time; "
            "use --on-context-full stop to end there"
        )
    return line


def describe_programs(programs: Sequence) -> str:
    """The compiled programs, one per line, and their totals."""
    lines = []
    for program in programs:
        sizes = f" ({program.sizes})" if program.sizes else ""
        cached = ", from the cache" if program.cached else ""
        lines.append(f"compiled {program.name}{sizes} in {program.seconds:.2f} s{cached}")
    seconds = sum(program.seconds for program in programs)
    n_cached = sum(program.cached for program in programs)
    all_programs = counted(len(programs), "program")
    lines.append(f"{all_programs} in {seconds:.1f} s, {n_cached} of them from the cache")
    return "\n".join(lines)


# User input.


def flag(name: str) -> str:
    """The flag of a field: --top-k for `top_k`."""
    return "--" + name.replace("_", "-")


def parse_ids(flag: str, text: str) -> list[int]:
    """The integers in text such as `1 2 3`; UserError naming `flag` for anything else."""
    words = text.split()
    require(
        all(re.fullmatch("-?[0-9]{1,19}", word) for word in words),
        f"{flag} {text!r}: expected integers separated by spaces: {flag} '1 2 3'",
    )
    return [int(word) for word in words]


def read_text(flag: str, path: Path) -> str:
    """The text of a file, or of standard input for `-`; UserError naming `flag` if it cannot be
    read. Invalid UTF-8 becomes U+FFFD, with a note."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; expected a text file") from None
    text = content.decode("utf-8", "replace")
    if text.encode() != content:
        note(f"note: {flag} {path} is not valid UTF-8: invalid bytes are read as U+FFFD")
    return text


def has_piped_text() -> bool:
    """Whether standard input is a pipe or a regular file, so not /dev/null or a terminal."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or replaced by a test
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_lines() -> Iterator[str]:
    """The lines typed until Ctrl-D, or the lines of a pipe. On a terminal they can be edited, the
    arrow keys recall earlier ones, and Ctrl-C discards the current one."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    note("type a prompt and press Enter; Ctrl-C stops a completion, Ctrl-D quits")
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - gives input() line editing
    question = "> " if sys.stdout.isatty() else ""  # a pipe gets only completions
    while True:
        try:
            line = input(question)
        except KeyboardInterrupt:
            note("")
            continue
        except EOFError:
            note("")
            return
        yield line


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C only sets the event and the second raises
    KeyboardInterrupt."""
    pressed = threading.Event()

    def handle(*_) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
