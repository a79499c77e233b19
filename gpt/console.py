"""What entry points show on a terminal and read from it. Knows no model, no flags and no JAX.

An entry point's room, like cli.py: text that is safe to show, rows that share one output, files
and lines that people type, Ctrl-C that waits.
"""

import contextlib
import io
import json
import math
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt.errors import UserError

# What moves the cursor, colours, clears or reorders: C0 but newline and tab, DEL, C1, and the
# overrides and isolates by which text is made to look like other text (Unicode Bidirectional
# Algorithm, 2.2-2.5).
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
MOST_LINES = 1000  # of history
ADVICE = {
    "length": "--max-new-tokens for more",
    "context": "the model's context of {context} tokens is full, --on-context-full slide goes on",
}


def visible(text: str) -> str:
    """`text` with each character that a terminal would obey spelled out, such as `\\x1b`."""
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def write(text: str) -> None:
    """`text` to standard output at once: as it is, but `visible` where that is a terminal."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def accept_any_text() -> None:
    """Let no character fail for the locale: what an output cannot show is spelled out, and bytes
    typed that are no text arrive as lone surrogates, as those of the command line do."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def to_json(value: Any) -> str:
    """`value` on one line of strict JSON, safe on a terminal: no NaN or Infinity but null."""
    ascii_only = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    line = json.dumps(finite(value), ensure_ascii=ascii_only, allow_nan=False)
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def finite(value: Any) -> Any:
    """`value` with null for every number that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spell(token: bytes) -> str:
    """A token in quotes, whatever it holds; one that is no whole character as bytes."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def label(prompt: int, sample: int, more: str = "") -> str:
    """The line above one of several completions."""
    return f"--- prompt {prompt + 1}, sample {sample + 1}{more} ---\n"


def tables(completion, first: int, tokenizer) -> str:
    """The likeliest tokens before each draw from token `first` on, the drawn one among them."""
    text = ""
    for i in range(first, len(completion.token_ids)):
        drawn, top = completion.token_ids[i], completion.top[i]
        if drawn not in dict(top):
            top = [*top, (drawn, math.exp(completion.logprobs[i]))]
        rows = [(token == drawn, p, tokenizer.decode_bytes([token])) for token, p in top]
        text += table(f"step {i}" if i else "after prefill", rows)
    return text


def table(title: str, rows: Iterable[tuple[bool, float, bytes]]) -> str:
    """Lines of tokens with their probabilities, those that were drawn marked by `*`."""
    lines = [f"  {'*' if drawn else ' '} {p:9.4%}  {spell(token)}" for drawn, p, token in rows]
    return "\n".join([title, *lines, ""])


def describe_end(done: Sequence, context: int) -> str:
    """The two phases of some completions, and why they ended."""
    last = max(done, key=lambda one: one.decode_seconds)
    rate = f", {last.tokens_per_second:.0f} tokens/s a row" if last.tokens_per_second else ""
    reasons = Counter(one.finish_reason or "Ctrl-C" for one in done)
    ends = [name + f" ({n} times)" * (n > 1) for name, n in reasons.items()]
    advice = [ADVICE[name].format(context=context) for name in reasons if name in ADVICE]
    return (
        f"prefill {last.prefill_seconds * 1e3:.1f} ms, decode {last.decode_seconds:.2f} s{rate} "
        f"(compilation left out); stopped by {', '.join(ends)}"
        + (f": {'; '.join(advice)}" if advice else "")
    )


def describe_programs(each: Sequence) -> str:
    """Programs that were compiled, one on a line, and their number."""
    lines = [
        f"compiled {one.name} in {one.seconds:.2f} s{', from the cache' if one.cached else ''}"
        for one in each
    ]
    seconds, cached = sum(one.seconds for one in each), sum(one.cached for one in each)
    total = f"{len(each)} programs in {seconds:.1f} s, {cached} of them from the cache"
    return "\n".join([*lines, total])


class Rows:
    """Several streams on one output, row after row, whatever the order in which they come.

    The first row is shown as it comes while the others wait; when it has ended the next one shows
    what it has and goes on. So the text does not depend on how it was cut in pieces.
    """

    def __init__(self, n: int):
        self.waiting = [""] * n
        self.ended = [False] * n
        self.current = 0

    def push(self, row: int, text: str, ended: bool = False) -> str:
        """`row` has gained `text`: what may be shown now."""
        self.waiting[row] += text
        self.ended[row] = ended
        ready = ""
        while self.current < len(self.waiting):
            ready, self.waiting[self.current] = ready + self.waiting[self.current], ""
            if not self.ended[self.current]:
                break
            self.current += 1
        return ready


def parse_ids(flag: str, text: str) -> list[int]:
    """`1 2 3` as numbers; UserError, which names `flag`, if it is something else."""
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        hint = f"expected whole numbers, spaces between: {flag} '1 2 3'"
        raise UserError(f"{flag} {text!r}: {hint}") from None


def read_text(flag: str, path: Path) -> str:
    """All of a file, or of standard input for `-`, to the byte; what is no UTF-8 is U+FFFD.

    UserError, which names `flag`, if it cannot be read.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; expected a file of text") from None
    text = content.decode("utf-8", "replace")
    if text.encode() != content:
        print(f"note: {path} is not all UTF-8: the rest is read as U+FFFD", file=sys.stderr)
    return text


def read_lines(history: Path) -> Iterator[str]:
    """The lines that a person types, to Ctrl-D, or those of a pipe.

    At a terminal lines can be edited, those of earlier days are kept in the file `history`, and
    Ctrl-C drops the line.
    """
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    keep = remember(history)
    while True:
        try:
            line = ask("> ")
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        keep()
        yield line


def ask(question: str) -> str:
    """A line from the terminal; the question stays out of a pipe that standard output may be."""
    if sys.stdout.isatty():
        return input(question)
    print(question, end="", file=sys.stderr, flush=True)
    return input()


def remember(history: Path):
    """Turn line editing on, with the lines in `history`; a function that writes them there."""
    try:
        import readline
    except ImportError:  # as on Windows: lines can be typed all the same
        return lambda: None
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(MOST_LINES)

    def keep():
        with contextlib.suppress(OSError):
            readline.write_history_file(history)

    return keep


@contextlib.contextmanager
def patient_interrupt() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C only sets the event, so that it breaks nothing off; the next one
    is a KeyboardInterrupt."""
    pressed = threading.Event()

    def note(*_):
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
