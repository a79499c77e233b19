"""What entry points show on a terminal and read from it. Knows no model and no JAX, and of flags no
more than the names that it tells people.

An entry point's room, like cli.py: text that is safe to show, files and lines that people type,
standard streams that may be closed, Ctrl-C that waits.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt.errors import UserError, require

# What moves the cursor, colours, clears or reorders: C0 but newline and tab, DEL, C1, and the
# overrides and isolates by which text is made to look like other text (Unicode Bidirectional
# Algorithm, 2.2-2.5).
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
MOST_LINES = 1000  # of history
MOST_TEXT = 2**30  # bytes of a prompt's file: a device may never end
TIMING = "compilation is left out; the first completion of a process includes its start-up"
ADVICE = {
    "length": "--max-new-tokens for more",
    "context": "the model's context of {context} tokens is full{more}",
}


def visible(text: str) -> str:
    """`text` with each character that a terminal would obey spelled out, such as `\\x1b`."""
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def write(text: str) -> None:
    """`text` to standard output at once: as it is, but `visible` where that is a terminal."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def fill_streams() -> None:
    """Put nothing where the shell has closed a standard stream, lest the next file that is opened
    takes its place; UserError if it is standard output, which is what all is done for.

    A closed standard input stays None: those who read it say so.
    """
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    closed = sys.stdout is None
    if closed:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    require(not closed, "standard output is closed: expected somewhere to print to")


def require_input(flag: str) -> None:
    """UserError, which names `flag`, if standard input is closed."""
    require(sys.stdin is not None, f"{flag}: standard input is closed; expected one to read")


def flag(name: str) -> str:
    """`top_k` as people type it."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def as_typed(*kinds: type) -> Iterator[None]:
    """Within, what a UserError says of a field of these dataclasses it says of the flag."""
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    try:
        yield
    except UserError as error:
        said = re.match(r"(\w+) (is|of token|names token|forbids) ", str(error))
        if not said or said[1] not in names:
            raise
        raise UserError(flag(said[1]) + str(error)[said.end(1) :]) from None


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


def completion_json(completion) -> dict[str, Any]:
    """A completion as JSON values."""
    names = ("prompt", "text", "token_ids", "logprobs", "finish_reason", "prefill_seconds")
    names += ("decode_seconds", "tokens_per_second", "seed", "sample")
    return {name: getattr(completion, name) for name in names} | {"timing": TIMING}


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
    text, ended = "", [completion.eot] * (completion.finish_reason == "eos")
    drawn = completion.token_ids + ended
    for i in range(first, len(drawn)):
        rows = [(token, f"{p:9.4%}") for token, p in completion.top[i]]
        if drawn[i] not in dict(rows):
            # The probability of an end-of-text is not kept: at most that of the last one shown.
            known = i < len(completion.logprobs)
            p = f"{math.exp(completion.logprobs[i]):9.4%}" if known else f"<={rows[-1][1].strip()}"
            rows.append((drawn[i], p))
        lines = [
            f"  {'*' if token == drawn[i] else ' '} {p}  {spell(tokenizer.decode_bytes([token]))}"
            for token, p in rows
        ]
        text += "\n".join([f"step {i}" if i else "after prefill", *lines, ""])
    return text


def describe_end(done: Sequence, context: int, slides: bool = True) -> str:
    """The two phases of some completions, why they ended, and what would let them go on; `slides`:
    whether a full context can slide, which it cannot in beam search."""
    last = max(done, key=lambda one: one.decode_seconds)
    rate = f", {last.tokens_per_second:.0f} tokens/s a row" if last.tokens_per_second else ""
    reasons = Counter(one.finish_reason or "Ctrl-C" for one in done)
    ends = [name + f" ({n} times)" * (n > 1) for name, n in reasons.items()]
    words = {"context": context, "more": ", --on-context-full slide goes on" * slides}
    advice = [ADVICE[name].format(**words) for name in reasons if name in ADVICE]
    return (
        f"prefill {last.prefill_seconds * 1e3:.1f} ms, decode {last.decode_seconds:.2f} s{rate} "
        f"(compilation left out); stopped by {', '.join(ends)}"
        + (f": {'; '.join(advice)}" if advice else "")
    )


def describe_programs(each: Sequence) -> str:
    """Programs that were compiled, one on a line, and their number."""
    lines = [
        f"compiled {one.name}{f' ({one.sizes})' if one.sizes else ''} in {one.seconds:.2f} s"
        + ", from the cache" * one.cached
        for one in each
    ]
    seconds, cached = sum(one.seconds for one in each), sum(one.cached for one in each)
    total = f"{len(each)} programs in {seconds:.1f} s, {cached} of them from the cache"
    return "\n".join([*lines, total])


@contextlib.contextmanager
def leaving(rows) -> Iterator[None]:
    """Within, what breaks `rows` (see sampling/turns.py) off loses none that has ended."""
    try:
        yield
    except (KeyboardInterrupt, UserError):
        write(rows.leave(sys.stdout.isatty()))
        raise


def parse_ids(flag: str, text: str) -> list[int]:
    """`1 2 3` as numbers; UserError, which names `flag`, if it is something else."""
    hint = f"expected whole numbers, spaces between: {flag} '1 2 3'"
    good = all(re.fullmatch("-?[0-9]{1,19}", word) for word in text.split())
    require(good, f"{flag} {text!r}: {hint}")
    return [int(word) for word in text.split()]


def decode(name: str, content: bytes) -> str:
    """The text of what a person gave as `name`; what is no UTF-8 is U+FFFD, and said to be."""
    text = content.decode("utf-8", "replace")
    if text.encode() != content:
        print(f"note: {name} is not all UTF-8: the rest is read as U+FFFD", file=sys.stderr)
    return text


def as_text(name: str, typed: str) -> str:
    """What was typed as `name`, in which Python keeps bytes that are no text as lone surrogates."""
    try:
        return decode(name, typed.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a pair, as a Windows shell may hand over
        return decode(name, typed.encode("utf-8", "surrogatepass"))


def require_text(flag: str, typed: str) -> None:
    """UserError, which names `flag`, if what was typed is not all UTF-8."""
    good = not re.search("[\ud800-\udfff]", typed)
    require(good, f"{flag} {typed!r} is not all UTF-8: no text holds it; give whole characters")


def read_text(flag: str, path: Path) -> str:
    """All of a file, or of standard input for `-`, to the byte; what is no UTF-8 is U+FFFD.

    UserError, which names `flag`, if it cannot be read.
    """
    typed = str(path) == "-"
    if typed:
        require_input(f"{flag} -")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if typed else path.open("rb") as file:
            content = file.read(MOST_TEXT + 1)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; expected a file of text") from None
    short = len(content) <= MOST_TEXT
    require(short, f"{flag} {path}: expected a text of at most {MOST_TEXT:,} bytes")
    return decode(f"{flag} {path}", content)


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
