"""Text to token ids and back: bytes, characters, a trained BPE, OpenAI's encodings.

Every tokenizer has the methods of `Tokenizer` below. Its ids are 0..n_vocab-1 without a gap, so any
id that a model can produce decodes; one of them ends a text, and no text ever encodes to it.
Knows nothing of models, data files or JAX.
"""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import rustbpe
import tiktoken

from gpt.data.hf_tokenizer import CHARACTER_OF_BYTE, KIND, HFTokenizer
from gpt.errors import UserError, require

FORMAT = "gpt tokenizer"
VERSION = 1
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer.

    `eot_token` is the id that ends a text, or -1 for none (only `IdTokenizer`).
    """

    name: str
    n_vocab: int
    eot_token: int

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, never a special one; a lone surrogate becomes U+FFFD."""

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may end within a character."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""


def create(name: str, documents: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """The tokenizer called `name` (byte, char, bpe, an OpenAI encoding), or saved in that file.

    `documents` yields the training text, read only by char and bpe; `vocab_size` is bpe's number
    of ids, end-of-text included. Raises UserError for a wrong name, file or size, and for a
    vocabulary that cannot be downloaded.
    """
    if name == "byte":
        return byte_level("byte", BYTE_PATTERN, SINGLE_BYTES)
    if name == "char":
        return learn_characters(documents())
    if name == "bpe":
        return train_bpe(documents(), vocab_size)
    if name in OPENAI_ENCODINGS:
        return openai_encoding(name)
    names = ", ".join(["byte", "char", "bpe", *OPENAI_ENCODINGS])
    require(
        os.path.isfile(name),
        f"{name!r} is neither a tokenizer nor a file: "
        f"expected one of {names}, or the path of a saved tokenizer",
    )
    return load(Path(name))


def load(path: Path) -> Tokenizer:
    """The tokenizer in `path`: a JSON file written by `save`, or a `.tiktoken` file of ranks.

    A rank file holds no pattern: text is split by cl100k_base's. UserError for a damaged file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".tiktoken":
            tokens = parse_ranks(text)
            return checked_byte_level(path.stem, GPT4_PATTERN, tokens, {END_OF_TEXT: len(tokens)})
        return from_json(json.loads(text))
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from None


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer as a JSON file, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        written.write_text(json.dumps(to_json(tokenizer)), encoding="utf-8")
        os.replace(written, path)


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as plain JSON values, with its digest."""
    header = {"format": FORMAT, "version": VERSION, "name": tokenizer.name}
    body = tokenizer.to_json() if isinstance(tokenizer, HFTokenizer) else contents(tokenizer)
    return header | body | {"digest": digest(tokenizer)}


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 in hex of what decides the ids: equal on every machine, whatever the name."""
    return sha256_of(contents(tokenizer))


def from_json(values: Any) -> Tokenizer:
    """The tokenizer that `to_json` wrote.

    UserError unless the values have their digest and a sample text survives a round trip.
    """
    check(isinstance(values, dict) and values.get("format") == FORMAT, "it is not one")
    check(values.get("version") == VERSION, f"its version is not {VERSION}")
    check(isinstance(values.get("name"), str), "it has no name")
    if values.get("kind") == KIND:
        imported = HFTokenizer.from_json(values)
        check(values.get("digest") == digest(imported), DAMAGED)
        return imported

    # A flipped byte is found here, before anything is built from it.
    header = ("format", "version", "name", "digest")
    body = {key: value for key, value in values.items() if key not in header}
    check(values.get("digest") == sha256_of(body), DAMAGED)

    try:
        if "characters" in body:
            return CharTokenizer(body["characters"])
        if "n_vocab" in body:
            return IdTokenizer(body["n_vocab"], body["end"])
        tokens = [base64.b64decode(token, validate=True) for token in body["ranks"]]
        return checked_byte_level(values["name"], body["pattern"], tokens, body["special_tokens"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the saved tokenizer cannot be used: {error!r}") from None


# ------------------------------------------------------------ the kinds of tokenizer


class ByteLevelTokenizer(tiktoken.Encoding):
    """A tiktoken encoding that remembers what it was made of.

    pat_str: the regular expression that cuts text into pieces before merging.
    mergeable_ranks: the id of each token; lower ids are merged first.
    special_tokens: the ids of `END_OF_TEXT` and of other tokens that no text encodes to.
    """

    def __init__(
        self,
        name: str,
        *,
        pat_str: str,
        mergeable_ranks: dict[bytes, int],
        special_tokens: dict[str, int],
    ):
        parts = {"pat_str": pat_str, "mergeable_ranks": mergeable_ranks}
        super().__init__(name, **parts, special_tokens=special_tokens)
        self.pattern = pat_str
        self.ranks = mergeable_ranks
        self.special_tokens = special_tokens

    def encode_ordinary(self, text: str) -> list[int]:
        """As tiktoken does, whose batches use this too; UserError if `text` cannot be split."""
        with refusing_long_runs():
            return super().encode_ordinary(text)


class CharTokenizer:
    """One id for each character seen in the training text, and one for end-of-text."""

    name = "char"

    def __init__(self, characters: str):
        self.characters = characters
        self.eot_token = len(characters)
        self.n_vocab = len(characters) + 1
        self._ids = {character: i for i, character in enumerate(characters)}
        self._bytes = [character.encode() for character in characters] + [END_OF_TEXT.encode()]

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, never the special one; UserError names a character without an id."""
        try:
            return [self._ids[character] for character in without_lone_surrogates(text)]
        except KeyError as error:
            raise UserError(
                f"the character {error.args[0]!r} is not among the {len(self.characters)} "
                "the char tokenizer knows: leave it out, or train with --tokenizer byte or bpe"
            ) from None

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text. Threads would not help: the work holds Python's global lock."""
        return [self.encode_ordinary(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`."""
        return b"".join([self._bytes[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self.decode_bytes(ids).decode()


class IdTokenizer:
    """The ids themselves, for a model that came without a tokenizer: id 5 is written `<5>`.

    `eot_token`: the id that ends a text, or -1 for none.
    """

    name = "ids"

    def __init__(self, n_vocab: int, eot_token: int = -1):
        self.n_vocab = n_vocab
        self.eot_token = eot_token

    def encode_ordinary(self, text: str) -> list[int]:
        """No ids for an empty text, if texts have an end here; UserError for any other."""
        require(
            text == "" and self.eot_token >= 0,
            "the model came without a tokenizer and cannot read text: give ids, as in "
            '--prompt-ids "1 2 3" or --score-ids "1 2 3"',
        )
        return []

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int = 1) -> list[list[int]]:
        """As `encode_ordinary`, for each text."""
        return [self.encode_ordinary(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The ids, written out."""
        return self.decode(ids).encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The ids, written out."""
        return "".join(f"<{i}>" for i in ids)


def byte_level(
    name: str, pattern: str, tokens: list[bytes], special_tokens: dict[str, int] | None = None
) -> ByteLevelTokenizer:
    """A byte-level BPE of `tokens` in the order they are merged in.

    They take the ids that `special_tokens` leave free; by default end-of-text follows them.
    """
    special_tokens = special_tokens or {END_OF_TEXT: len(tokens)}
    taken = set(special_tokens.values())
    free = (i for i in range(len(tokens) + len(special_tokens)) if i not in taken)
    return ByteLevelTokenizer(
        name,
        pat_str=pattern,
        mergeable_ranks=dict(zip(tokens, free, strict=False)),
        special_tokens=special_tokens,
    )


# ------------------------------------------------------------ learned from text

SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
BYTE_PATTERN = r"[\s\S]{1,32}"  # any 32 characters: nothing is ever merged, and short is fast
GPT4_PATTERN = (  # cl100k_base's: a run of spaces stays one piece, which suits source code
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TRAINING_BUFFER = 64  # texts handed to the BPE trainer at once: each may be a megabyte


def learn_characters(documents: Iterable[str]) -> CharTokenizer:
    """The character tokenizer of all characters in `documents`, sorted."""
    characters: set[str] = set()
    for text in documents:
        characters.update(without_lone_surrogates(text))
    require(bool(characters), "the char tokenizer needs text to learn its characters from")
    return CharTokenizer("".join(sorted(characters)))


def train_bpe(documents: Iterable[str], vocab_size: int) -> ByteLevelTokenizer:
    """A byte-level BPE of `vocab_size` ids, fewer if the text is too small for that many merges."""
    require(
        vocab_size >= 257,
        f"vocab_size is {vocab_size}: a bpe needs at least 257, the 256 bytes and end-of-text",
    )
    trainer = rustbpe.Tokenizer()
    with refusing_long_runs():
        trainer.train_from_iterator(
            (without_lone_surrogates(text) for text in documents),
            vocab_size=vocab_size - 1,
            buffer_size=TRAINING_BUFFER,
            pattern=GPT4_PATTERN,
        )
    by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])
    return byte_level("bpe", GPT4_PATTERN, [bytes(token) for token, _ in by_rank])


@contextlib.contextmanager
def refusing_long_runs() -> Iterator[None]:
    """Turn the panic of a Rust library into UserError: its stack of a million entries overflows
    where a pattern meets a run of about as many spaces. Each library has a class of its own."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise UserError(
            "the text cannot be split into tokens, as happens where it has about a million spaces "
            "in a row: shorten such runs, or use --tokenizer byte or char"
        ) from None


def without_lone_surrogates(text: str) -> str:
    """`text` as valid Unicode: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ------------------------------------------------------------ OpenAI's encodings


class OpenAIEncoding(NamedTuple):
    """Where the vocabulary of one of OpenAI's encodings lies, and what is not in that file."""

    url: str
    sha256: str
    pattern: str
    special_tokens: dict[str, int]


PUBLIC = "https://openaipublic.blob.core.windows.net"
OPENAI_ENCODINGS = {
    "gpt2": OpenAIEncoding(
        f"{PUBLIC}/gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        {END_OF_TEXT: 50256},
    ),
    "cl100k_base": OpenAIEncoding(
        f"{PUBLIC}/encodings/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        GPT4_PATTERN,
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": OpenAIEncoding(
        f"{PUBLIC}/encodings/o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}


def openai_encoding(name: str) -> ByteLevelTokenizer:
    """OpenAI's encoding, its vocabulary from tiktoken's cache or from the network."""
    known = OPENAI_ENCODINGS[name]
    vocabulary = read_cached(name, known).decode()
    if known.url.endswith(".tiktoken"):
        tokens = parse_ranks(vocabulary)
    else:
        tokens = parse_gpt2_merges(vocabulary)

    # Ids that nothing has get a name, so that whatever a model produces decodes.
    special_tokens = dict(known.special_tokens)
    taken = set(special_tokens.values())
    for i in range(len(tokens), max(taken)):
        if i not in taken:
            special_tokens[f"<|unused_{i}|>"] = i
    return byte_level(name, known.pattern, tokens, special_tokens)


def read_cached(name: str, known: OpenAIEncoding) -> bytes:
    """The vocabulary file, kept where tiktoken keeps it too; UserError says how to supply it."""
    variables = (os.environ.get("TIKTOKEN_CACHE_DIR"), os.environ.get("DATA_GYM_CACHE_DIR"))
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = Path(variables[0] or variables[1] or default)
    path = folder / hashlib.sha1(known.url.encode()).hexdigest()
    if path.is_file():
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == known.sha256:
            return content

    try:
        content = download(known.url)
        if hashlib.sha256(content).hexdigest() != known.sha256:
            raise ValueError("the file differs from the published one")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise UserError(
            f"the vocabulary of {name} is not on this machine and could not be downloaded "
            f"({reason}): save {known.url} as {path.name} in a folder, and set "
            "TIKTOKEN_CACHE_DIR to that folder"
        ) from None

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            written = Path(unfinished) / path.name
            written.write_bytes(content)
            os.replace(written, path)
    except OSError:
        pass  # it is only a cache: the next run downloads the file again
    return content


def download(url: str) -> bytes:
    """The file at `url`; OSError after 5 seconds without a connection, 30 without data."""
    import requests  # slow to import and seldom needed

    response = requests.get(url, timeout=(5, 30))
    response.raise_for_status()
    return response.content


def parse_gpt2_merges(text: str) -> list[bytes]:
    """The tokens of GPT-2's vocab.bpe in order: the bytes, printable ones first, then the merges.

    The file has a line of version, then a merge on each: two tokens in GPT-2's byte alphabet.
    """
    byte_of = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
    tokens = [bytes([byte]) for byte in CHARACTER_OF_BYTE]
    for merge in text.split("\n")[1:-1]:
        tokens.append(bytes([byte_of[character] for character in merge.replace(" ", "")]))
    return tokens


# ------------------------------------------------------------ reading and checking files

DAMAGED = "it is damaged: its contents do not have its digest"
SAMPLE = "The naïve  café's\n\n\tdef f(x1234):\r\n        return '今天', \"🏳️‍🌈\"  # ok?!   \n "


def contents(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the ids, as plain JSON; ranks are base64, in order."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.contents()
    if isinstance(tokenizer, CharTokenizer):
        return {"characters": tokenizer.characters}
    if isinstance(tokenizer, IdTokenizer):
        return {"n_vocab": tokenizer.n_vocab, "end": tokenizer.eot_token}
    by_rank = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    return {
        "pattern": tokenizer.pattern,
        "ranks": [base64.b64encode(token).decode() for token in by_rank],
        "special_tokens": dict(sorted(tokenizer.special_tokens.items())),
    }


def sha256_of(values: dict[str, Any]) -> str:
    """SHA-256 in hex of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check(condition: bool, reason: str) -> None:
    """Raise UserError for a tokenizer file with `reason` unless `condition` holds."""
    require(
        condition, f"the saved tokenizer cannot be used, {reason}: train again, or use another file"
    )


def parse_ranks(text: str) -> list[bytes]:
    """The tokens, in order of rank, from lines of a token in base64 and its rank."""
    entries = [line.split() for line in text.splitlines() if line]
    check(all(len(entry) == 2 for entry in entries), "a line is not a token and its rank")
    entries.sort(key=lambda entry: int(entry[1]))
    ranks = [int(rank) for _, rank in entries]
    check(ranks == list(range(len(entries))), "its ranks are not 0, 1, 2, ...")
    return [base64.b64decode(token, validate=True) for token, _ in entries]


def checked_byte_level(
    name: str, pattern: str, tokens: list[bytes], special_tokens: dict[str, int]
) -> ByteLevelTokenizer:
    """A byte-level tokenizer from a file's contents; UserError if they do not make one."""
    check(len(set(tokens)) == len(tokens) and b"" not in tokens, "a token is empty or there twice")
    check(set(SINGLE_BYTES) <= set(tokens), "a single byte has no token")
    ids = set(special_tokens.values())
    n_ids = len(tokens) + len(special_tokens)
    distinct = len(ids) == len(special_tokens) and ids <= set(range(n_ids))
    check(distinct, "its special ids leave a gap or stand twice")
    check(END_OF_TEXT in special_tokens, f"it lacks {END_OF_TEXT}")
    tokenizer = byte_level(name, pattern, tokens, special_tokens)
    kept = tokenizer.decode(tokenizer.encode_ordinary(SAMPLE)) == SAMPLE
    check(kept, "a text does not survive encoding and decoding")
    return tokenizer
