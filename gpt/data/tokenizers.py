"""Text to token ids and back: bytes, characters, a trained BPE, OpenAI's encodings.

Every tokenizer has the methods of `Tokenizer` below. Its ids are 0..n_vocab-1 without gaps, so any
id a model can produce can be decoded; one of them ends a text, and no text ever encodes to it.
Independent of models, data files and JAX.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import rustbpe
import tiktoken
from tiktoken_ext import openai_public

from gpt.data.hf_tokenizer import FILE, KIND, PAIR, HFTokenizer, open_file, open_pair
from gpt.errors import UserError, require
from gpt.wording import counted

FORMAT = "gpt tokenizer"
VERSION = 1
END_OF_TEXT = "<|endoftext|>"
OPENAI_ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")


class Tokenizer(Protocol):
    """What the rest of the project needs from a tokenizer.

    `eot_token` is the id that ends a text, or -1 for none (only `IdTokenizer`). `contents` is
    everything that determines the ids, as plain JSON.
    """

    name: str
    n_vocab: int
    eot_token: int
    contents: dict[str, Any]

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, never a special one."""

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode_ordinary(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may end within a character."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def create(name: str, documents: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """The tokenizer called `name` (byte, char, bpe, an OpenAI encoding), or the one saved in that
    file or folder.

    `documents` yields the training text, read only by char and bpe. `vocab_size` is bpe's number of
    ids including end-of-text; there are fewer if the text is too small for that many merges. Raises
    UserError for an invalid name, file or size, and for a vocabulary that cannot be downloaded.
    """
    if name == "byte":
        return ByteLevelTokenizer("byte", BYTE_PATTERN, SINGLE_BYTES)
    if name == "char":
        characters = sorted(set().union(*documents()))
        require(bool(characters), "the char tokenizer needs text to learn its characters from")
        return CharTokenizer("".join(characters))
    if name == "bpe":
        require(
            vocab_size >= 257,
            f"vocab_size is {vocab_size}: a bpe needs at least 257, the 256 bytes and end-of-text",
        )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(
            beginning(documents()),
            vocab_size - 1,
            buffer_size=TRAINING_BUFFER,
            pattern=GPT4_PATTERN,
        )
        by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])
        return ByteLevelTokenizer("bpe", GPT4_PATTERN, [bytes(token) for token, _ in by_rank])
    if name in OPENAI_ENCODINGS:
        return openai_encoding(name)
    names = ", ".join(["byte", "char", "bpe", *OPENAI_ENCODINGS])
    inside = [Path(name, file).is_file() for file in (FILE, *PAIR)]
    require(
        os.path.isfile(name) or any(inside),
        f"{name!r} is not a known tokenizer or a file: expected one of {names}, or the path of a "
        "tokenizer.json, or of a folder with one or with vocab.json and merges.txt",
    )
    return load(Path(name))


# ------------------------------------------------------------ the kinds of tokenizer


class ByteLevelTokenizer(tiktoken.Encoding):
    """A tiktoken encoding that remembers what it was made from.

    pattern: the regular expression that cuts text into pieces before merging.
    tokens: in the order of their ids, which is the order of merging.
    special_tokens: the ids of tokens that no text encodes to; by default only `END_OF_TEXT`.
    """

    def __init__(
        self,
        name: str,
        pattern: str,
        tokens: list[bytes],
        special_tokens: dict[str, int] | None = None,
    ):
        self.pattern = pattern
        self.tokens = tokens
        self.special_tokens = special_tokens or {END_OF_TEXT: len(tokens)}
        super().__init__(
            name,
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(tokens)},
            special_tokens=self.special_tokens,
        )
        self.contents = {
            "pattern": pattern,
            "ranks": [base64.b64encode(token).decode() for token in tokens],
            "special_tokens": dict(sorted(self.special_tokens.items())),
        }


class CharTokenizer(Tokenizer):
    """One id for each character seen in the training text, and one for end-of-text."""

    name = "char"

    def __init__(self, characters: str):
        self.characters = characters
        self.eot_token = len(characters)
        self.n_vocab = len(characters) + 1
        self._ids = {character: i for i, character in enumerate(characters)}
        self._bytes = [character.encode() for character in characters] + [END_OF_TEXT.encode()]
        self.contents = {"characters": characters}

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, never the special one; UserError names the characters without an id."""
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            unknown = list(dict.fromkeys(one for one in text if one not in self._ids))
            more = ", ..." if len(unknown) > 20 else ""
            raise UserError(
                "this model was not trained on these characters: "
                f"{', '.join(map(repr, unknown[:20]))}{more}. It knows "
                f"{counted(len(self.characters), 'other')}: leave these out, or train a model that "
                "knows every character, with --tokenizer byte or bpe"
            ) from None

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._bytes[i] for i in ids])


class IdTokenizer(Tokenizer):
    """The ids themselves, for a model that came without a tokenizer: id 5 is written `<5>`."""

    name = "ids"

    def __init__(self, n_vocab: int, eot_token: int = -1):
        self.n_vocab = n_vocab
        self.eot_token = eot_token
        self.contents = {"n_vocab": n_vocab, "end": eot_token}

    def encode_ordinary(self, text: str) -> list[int]:
        """No ids for an empty text, if there is an end-of-text id; UserError for any other."""
        require(
            text == "" and self.eot_token >= 0,
            "the model came without a tokenizer and cannot read text: give ids, as in "
            '--prompt-ids "1 2 3" or --score-ids "1 2 3"',
        )
        return []

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(f"<{i}>" for i in ids).encode()


# ------------------------------------------------------------ byte-level BPEs

SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
BYTE_PATTERN = r"[\s\S]{1,32}"  # up to 32 characters; nothing is merged, and short pieces are fast
GPT4_PATTERN = (  # cl100k_base's: a run of spaces stays one piece, which suits source code
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TRAINING_BUFFER = 64  # texts per batch for the BPE trainer; each may be a megabyte
TRAINED_ON = 2**31  # maximum characters of text to train a BPE on


def beginning(texts: Iterable[str]) -> Iterator[str]:
    """The first texts, together about TRAINED_ON characters."""
    length = 0
    for text in texts:
        yield text
        length += len(text)
        if length >= TRAINED_ON:
            return


def openai_encoding(name: str) -> ByteLevelTokenizer:
    """An OpenAI encoding; tiktoken finds its vocabulary in its cache or downloads it."""
    try:
        parts = openai_public.ENCODING_CONSTRUCTORS[name]()
    except (OSError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise UserError(
            f"the vocabulary of {name} is not on this machine and could not be downloaded "
            f"({reason}): on a machine with a network, set TIKTOKEN_CACHE_DIR to a folder and run "
            f"python -c \"import tiktoken; tiktoken.get_encoding('{name}')\", then copy that "
            "folder to this machine and set TIKTOKEN_CACHE_DIR to it; --tokenizer bpe, which is "
            "made from your text, needs no download"
        ) from None

    # Ids without a token get a name, so that every id a model can produce can be decoded.
    special_tokens = parts["special_tokens"]
    ranks = parts["mergeable_ranks"]
    for i in range(len(ranks), max(special_tokens.values())):
        if i not in special_tokens.values():
            special_tokens[f"<|unused_{i}|>"] = i
    tokens = sorted(ranks, key=ranks.__getitem__)
    return ByteLevelTokenizer(name, parts["pat_str"], tokens, special_tokens)


def without_lone_surrogates(text: str) -> str:
    """`text` as valid Unicode: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ------------------------------------------------------------ saving and loading


def load(path: Path) -> Tokenizer:
    """The tokenizer in `path`: a JSON file written by `save`, a Hugging Face tokenizer.json, or
    vocab.json and merges.txt; or a folder with one of these.

    UserError for a damaged file.
    """
    try:
        if path.is_dir() or path.name in PAIR:
            folder = path if path.is_dir() else path.parent
            path = folder / FILE
            if not path.is_file():
                return open_pair(folder)
        values = json.loads(path.read_text(encoding="utf-8"))
        is_theirs = isinstance(values, dict) and "model" in values
        return open_file(path) if is_theirs else from_json(values)
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from None


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer as a JSON file, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(to_json(tokenizer)), encoding="utf-8")
    unfinished.replace(path)


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as plain JSON values, with its digest."""
    header = {"format": FORMAT, "version": VERSION, "name": tokenizer.name}
    files = tokenizer.files_as_json() if isinstance(tokenizer, HFTokenizer) else {}
    return header | tokenizer.contents | files | {"digest": digest(tokenizer)}


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 in hex of what determines the ids: the same on every machine, whatever the name."""
    return sha256_of(tokenizer.contents)


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def from_json(values: Any) -> Tokenizer:
    """The tokenizer written by `to_json`; UserError unless the values match their digest."""
    require(
        isinstance(values, dict)
        and values.get("format") == FORMAT
        and values.get("version") == VERSION,
        f"the saved tokenizer is not version {VERSION} of this format",
    )
    header = ("format", "version", "name", "digest", "files", "special_ids")
    contents = {key: value for key, value in values.items() if key not in header}
    require(
        values.get("digest") == sha256_of(contents),
        "the saved tokenizer is damaged: its contents do not match its digest",
    )
    try:
        if contents.get("kind") == KIND:
            return HFTokenizer.from_json(values)
        if "characters" in contents:
            return CharTokenizer(contents["characters"])
        if "n_vocab" in contents:
            return IdTokenizer(contents["n_vocab"], contents["end"])
        tokens = [base64.b64decode(token) for token in contents["ranks"]]
        special_tokens = contents["special_tokens"]
        return ByteLevelTokenizer(values["name"], contents["pattern"], tokens, special_tokens)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise UserError(f"the saved tokenizer is damaged: {error!r}") from None
