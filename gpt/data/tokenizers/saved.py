"""Tokenizers in files: plain JSON, refused unless it keeps every text; rank files of others.

Knows nothing of models or of JAX. A file may come from anyone: nothing in it is trusted.
"""

import base64
import binascii
import functools
import hashlib
import json
import os
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

from gpt.data.hf_tokenizer import KIND, HFTokenizer
from gpt.data.tokenizers.encodings import (
    END_OF_TEXT,
    GPT4_PATTERN,
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
    byte_level,
    lacking_bytes,
    without_lone_surrogates,
)
from gpt.errors import UserError, require

FORMAT = "gpt tokenizer"
VERSION = 1
MOST_IDS = 2**24
SECONDS_TO_ENCODE = 10  # a text that takes a tenth of a second


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what decides the ids, in hex: equal on every machine, whatever the name."""
    content = json.dumps(contents(tokenizer), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def contents(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the ids, as plain JSON; ranks are base64, in order."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.contents()
    if isinstance(tokenizer, CharTokenizer):
        return {"characters": tokenizer.characters}
    if isinstance(tokenizer, IdTokenizer):
        return {"n_vocab": tokenizer.n_vocab, "end": tokenizer.eot_token}
    own = {"end": (tokenizer.end, END_OF_TEXT), "form": (tokenizer.form, None)}
    ranks = tokenizer._mergeable_ranks
    return {
        "pattern": tokenizer._pat_str,
        "ranks": [base64.b64encode(t).decode() for t in sorted(ranks, key=ranks.__getitem__)],
        "special_tokens": dict(sorted(tokenizer._special_tokens.items())),
    } | {name: value for name, (value, usual) in own.items() if value != usual}


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as plain JSON values, with its digest."""
    head = {"format": FORMAT, "version": VERSION, "name": tokenizer.name}
    body = tokenizer.to_json() if isinstance(tokenizer, HFTokenizer) else contents(tokenizer)
    return head | body | {"digest": digest(tokenizer)}


def from_json(values: Any) -> Tokenizer:
    """The tokenizer of to_json's values, proved by a round trip; UserError if they are wrong."""
    check(isinstance(values, dict) and values.get("format") == FORMAT, "it is not one")
    check(values.get("version") == VERSION, f"its version is not {VERSION}")
    check(isinstance(values.get("name"), str), "it has no name")
    if values.get("kind") == KIND:
        tokenizer = HFTokenizer.from_json(values)
    elif "characters" in values:
        tokenizer = read_characters(values["characters"])
    elif "n_vocab" in values:
        tokenizer = read_ids(values)
    else:
        tokens = [read_token(token) for token in check_type(values, "ranks", list)]
        special = check_type(values, "special_tokens", dict)
        ending = {name: values[name] for name in ("end", "form") if name in values}
        pattern = check_type(values, "pattern", str)
        tokenizer = build(values["name"], pattern, tokens, special, **ending)
    check(values.get("digest") == digest(tokenizer), "its contents do not have its digest")
    return tokenizer


def check(condition: bool, reason: str) -> None:
    """Raise UserError for a tokenizer file with `reason` unless `condition` holds."""
    require(
        condition, f"the saved tokenizer cannot be used, {reason}: train again, or use another file"
    )


def check_type(values: dict[str, Any], key: str, kind: type) -> Any:
    """The value at `key`, of type `kind`."""
    check(isinstance(values.get(key), kind), f"{key!r} is missing or of the wrong type")
    return values[key]


def read_characters(characters: Any) -> CharTokenizer:
    """A character tokenizer from its saved string."""
    usable = isinstance(characters, str) and characters != ""
    check(
        usable and sorted(set(characters)) == list(characters),
        "its characters are not a sorted set",
    )
    check(without_lone_surrogates(characters) == characters, "its characters are not Unicode")
    return CharTokenizer(characters)


def read_ids(values: dict[str, Any]) -> IdTokenizer:
    """The tokenizer of ids alone."""
    n_vocab, end = check_type(values, "n_vocab", int), check_type(values, "end", int)
    check(1 <= n_vocab <= MOST_IDS and -1 <= end < n_vocab, "its number of ids is impossible")
    return IdTokenizer(n_vocab, end)


def read_token(text: Any) -> bytes:
    """One saved token."""
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise UserError(f"the saved tokenizer has a token that is not base64: {text!r}") from None


def build(
    name: str,
    pattern: str,
    tokens: list[bytes],
    special: dict[str, int],
    end: str = END_OF_TEXT,
    form: str | None = None,
) -> Tokenizer:
    """A byte-level tokenizer from a file's contents, refused unless it keeps every text."""
    distinct = set(tokens)
    check(len(distinct) == len(tokens) and b"" not in distinct, "a token is empty or there twice")
    lacking = b"".join(lacking_bytes(distinct))
    check(not any(set(lacking) & set(t) for t in tokens), "a token holds a byte that has no token")
    check(all(type(i) is int for i in special.values()), "a special token's id is no integer")
    n_ids, ids = len(tokens) + len(special), set(special.values())
    check(
        len(ids) == len(special) and all(0 <= i < n_ids for i in ids),
        "its special ids leave a gap or stand twice",
    )
    check(isinstance(end, str) and end in special, f"it lacks {end}")
    check(form in (None, "NFC"), f"its normal form is {form!r}")
    try:
        tokenizer = byte_level(name, pattern, tokens, special, end=end, form=form)
        text = tokenizer.normalised(wild_text())
        kept = encode_in_time(tokenizer.complete, wild_text()) == text.encode()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in tiktoken's Rust is no Exception
        raise UserError(f"the saved tokenizer's pattern does not work: {error}") from None
    check(kept, "a text does not survive encoding and decoding")
    return tokenizer


def encode_in_time(tokenizer: Tokenizer, text: str) -> bytes:
    """`text` encoded and decoded; TimeoutError if that takes a hundred times as long as it should.

    In a thread, since nothing can end a pattern that looks from each character to the end of the
    text: it is left behind, and ends with the process.
    """
    outcome: list[bytes | BaseException] = []

    def work():
        try:
            outcome.append(tokenizer.decode_bytes(tokenizer.encode_ordinary(text)))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ENCODE)
    if not outcome:
        raise TimeoutError(f"{len(text):,} characters took it over {SECONDS_TO_ENCODE} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@functools.cache
def wild_text() -> str:
    """About 130,000 characters of every kind, each alone and among white space and others."""
    ranges = (range(0x3000), range(0x3000, 0xD800, 64), range(0xE000, 0x110000, 64))
    characters = [chr(code) for codes in ranges for code in codes]
    blanks = [
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\t",
        "\r\n",
        "'s",
        "don't",
        "1234",
        "今天",
        END_OF_TEXT,
    ]
    mixed = characters + blanks * 2000
    random.Random(0).shuffle(mixed)
    return "".join([*characters, *mixed, "   \n "])


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer as a JSON file, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        written.write_text(json.dumps(to_json(tokenizer)), encoding="utf-8")
        os.replace(written, path)


def load(path: Path) -> Tokenizer:
    """The tokenizer in `path`: a JSON file of save's, or a `.tiktoken` file of ranks.

    A rank file holds no pattern: its text is split by cl100k_base's, whatever its origin.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".tiktoken":
            return from_ranks(path.stem, text)
        return from_json(json.loads(text))
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from None


def from_ranks(name: str, text: str) -> Tokenizer:
    """The tokenizer of a rank file's text: on each line a token in base64 and its rank."""
    entries = [line.split() for line in text.splitlines() if line]
    check(all(len(entry) == 2 for entry in entries), "a line is not a token and its rank")
    entries.sort(key=lambda entry: int(entry[1]))
    in_order = [int(rank) for _, rank in entries] == list(range(len(entries)))
    check(in_order, "its ranks are not 0, 1, 2, ...")
    tokens = [read_token(token) for token, _ in entries]
    check(not lacking_bytes(tokens), "a single byte has no token")
    return build(name, GPT4_PATTERN, tokens, {END_OF_TEXT: len(tokens)})
