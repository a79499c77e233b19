"""How each tokenizer is made: bytes, characters, a trained BPE, OpenAI's encodings.

Knows nothing of files of ours, of models or of JAX.
"""

import functools
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

import rustbpe
import tiktoken
import tiktoken.load
from tiktoken_ext import openai_public

from gpt.data.tokenizers import panics
from gpt.errors import UserError, require

END_OF_TEXT = "<|endoftext|>"
BYTE_PATTERN = r"[\s\S]{1,32}"  # any 32 characters: nothing is ever merged, short is fast
GPT4_PATTERN = (  # cl100k_base's; a run of spaces stays one piece, as source code wants
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TRAINING_BUFFER = 64  # texts handed to the BPE trainer at once: each may be a megabyte
LONGEST_BLANK = 65_536  # characters; the regex engine's stack overflows at some 700,000
PUBLIC = "https://openaipublic.blob.core.windows.net"
OPENAI_FILES = {  # what tiktoken downloads for each encoding
    "gpt2": (
        f"{PUBLIC}/gpt-2/encodings/main/vocab.bpe",
        f"{PUBLIC}/gpt-2/encodings/main/encoder.json",
    ),
    "cl100k_base": (f"{PUBLIC}/encodings/cl100k_base.tiktoken",),
    "o200k_base": (f"{PUBLIC}/encodings/o200k_base.tiktoken",),
}


class ByteLevelTokenizer(tiktoken.Encoding):
    """A tiktoken encoding that also survives very long runs of white space.

    `end`: the special token that ends a text. `form`: the Unicode normal form into which text is
    brought before it is encoded, None for none. `complete`: itself; where bytes have no token, the
    same with ids for them beyond the vocabulary's, as tiktoken's BPE must be able to start from
    every byte. Those ids never leave this class: a text that needs one is refused.
    """

    def __init__(self, name: str, *, end: str = END_OF_TEXT, form: str | None = None, **parts):
        super().__init__(name, **parts)
        self.end, self.form, self.complete = end, form, self
        if lacking := lacking_bytes(parts["mergeable_ranks"]):
            beyond = {byte: self.n_vocab + i for i, byte in enumerate(lacking)}
            parts["mergeable_ranks"] = parts["mergeable_ranks"] | beyond
            self.complete = ByteLevelTokenizer(name, end=end, form=form, **parts)

    @property
    def eot_token(self) -> int:
        """The id that ends a text."""
        return self._special_tokens[self.end]

    def normalised(self, text: str) -> str:
        """`text` as it is encoded."""
        return text if self.form is None else unicodedata.normalize(self.form, text)

    @panics.told()
    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, never a special one; a lone surrogate becomes U+FFFD.

        UserError names a character that has a byte without a token.
        """
        if self.complete is not self:
            return self.within(self.complete.encode_ordinary(text))
        encode = super().encode_ordinary
        return [token for part in cut_long_blanks(self.normalised(text)) for token in encode(part)]

    def encode(self, text: str, *, allowed_special=frozenset(), **options) -> list[int]:
        """As tiktoken's: special tokens that are allowed are found in `text` before it is brought
        into its normal form."""
        if self.complete is not self:
            options["allowed_special"] = allowed_special
            return self.within(self.complete.encode(text, **options))
        encode = functools.partial(super().encode, allowed_special=allowed_special, **options)
        names = self.special_tokens_set if allowed_special == "all" else allowed_special
        if self.form is None or not names:
            return encode(self.normalised(text))
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        return [
            token
            for i, part in enumerate(parts)
            for token in encode(part if i % 2 else self.normalised(part))
        ]

    def within(self, ids: list[int]) -> list[int]:
        """`ids` of the complete tokenizer; UserError if one is beyond this one's vocabulary.

        Nothing is left out instead: the neighbours of what is gone might join.
        """
        beyond = next((i for i in ids if i >= self.n_vocab), None)
        if beyond is not None:
            byte = self.complete.decode_bytes([beyond])
            text = self.complete.decode([i for i in ids if i not in self._special_token_values])
            character = next(c for c in text if byte in c.encode())
            raise UserError(
                f"the tokenizer has no token for the byte {byte.hex()} of the character "
                f"{character!r}: leave that character out"
            )
        return ids


class CharTokenizer:
    """One id for each character seen in the training text, and one for end-of-text."""

    name = "char"

    def __init__(self, characters: str):
        self.characters = characters
        self._ids = {character: i for i, character in enumerate(characters)}
        self.eot_token = len(characters)
        self.n_vocab = len(characters) + 1
        self._bytes = [character.encode() for character in characters] + [END_OF_TEXT.encode()]

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, never the special one; UserError names a character without one."""
        try:
            return [self._ids[character] for character in without_lone_surrogates(text)]
        except KeyError as error:
            raise UserError(
                f"the character {error.args[0]!r} is not among the {len(self.characters)} "
                "the char tokenizer knows: leave it out, or train with --tokenizer byte or bpe"
            ) from None

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text. Threads would not help here: the work holds Python's lock."""
        return [self.encode_ordinary(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`."""
        return b"".join(self._bytes[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self.decode_bytes(ids).decode()


class IdTokenizer:
    """The ids alone, of a model that came without a tokenizer: id 5 is spelled `<5>`.

    `eot_token`: the id that ends a text, or -1 for none.
    """

    name = "ids"

    def __init__(self, n_vocab: int, eot_token: int = -1):
        self.n_vocab, self.eot_token = n_vocab, eot_token

    def encode_ordinary(self, text: str) -> list[int]:
        """UserError: no text has ids here; an empty one has none, where texts have an end."""
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
        """The ids, spelled out."""
        return self.decode(ids).encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The ids, spelled out."""
        return "".join(f"<{i}>" for i in ids)


Tokenizer = tiktoken.Encoding | CharTokenizer | IdTokenizer


def byte_tokenizer() -> ByteLevelTokenizer:
    """One id for each byte, and one for end-of-text."""
    return byte_level("byte", BYTE_PATTERN, [bytes([byte]) for byte in range(256)])


def byte_level(
    name: str,
    pattern: str,
    ranks: list[bytes],
    special_tokens: dict[str, int] | None = None,
    **ending,
) -> ByteLevelTokenizer:
    """A byte-level BPE from its tokens in order of rank, which take the ids that are left free.

    End-of-text follows them by default. `ending`: `end` and `form`, as of ByteLevelTokenizer.
    """
    special = special_tokens or {END_OF_TEXT: len(ranks)}
    taken = set(special.values())
    free = (i for i in range(len(ranks) + len(special)) if i not in taken)
    return ByteLevelTokenizer(
        name,
        pat_str=pattern,
        mergeable_ranks=dict(zip(ranks, free, strict=False)),
        special_tokens=special,
        **ending,
    )


def lacking_bytes(tokens: Collection[bytes]) -> list[bytes]:
    """The single bytes that are not among `tokens`."""
    return [bytes([byte]) for byte in range(256) if bytes([byte]) not in tokens]


def with_unused(special: dict[str, int], ordinary: Iterable[int], n_vocab: int) -> dict[str, int]:
    """Special tokens with names for the ids that nothing has, below `n_vocab`."""
    taken = {*special.values(), *ordinary}
    free = (i for i in range(n_vocab) if i not in taken)
    return special | {f"<|unused_{i}|>": i for i in free}


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
    texts = (part for text in documents for part in cut_long_blanks(without_lone_surrogates(text)))
    trainer.train_from_iterator(
        texts, vocab_size=vocab_size - 1, buffer_size=TRAINING_BUFFER, pattern=GPT4_PATTERN
    )
    ranked = sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])
    return byte_level("bpe", GPT4_PATTERN, [bytes(token) for token, _ in ranked])


def openai_encoding(name: str) -> ByteLevelTokenizer:
    """OpenAI's encoding from tiktoken's cache or the network, its unused ids given names."""
    tiktokens_own = tiktoken.load.read_file
    tiktoken.load.read_file = download  # its own would wait for ever on a network that drops
    try:
        parts = openai_public.ENCODING_CONSTRUCTORS[name]()
    except (OSError, ValueError) as error:
        files = " and ".join(
            f"{url} as {hashlib.sha1(url.encode()).hexdigest()}" for url in OPENAI_FILES[name]
        )
        raise UserError(
            f"the vocabulary of {name} is not on this machine and could not be downloaded "
            f"({type(error).__name__}): save {files} in a folder, and set TIKTOKEN_CACHE_DIR to it"
        ) from None
    finally:
        tiktoken.load.read_file = tiktokens_own
    ranks = sorted(parts["mergeable_ranks"], key=parts["mergeable_ranks"].__getitem__)
    special = parts["special_tokens"]
    special = with_unused(special, parts["mergeable_ranks"].values(), max(special.values()) + 1)
    return byte_level(name, parts["pat_str"], ranks, special)


def download(url: str) -> bytes:
    """The file at `url`; OSError after 5 seconds without a connection, 30 without data."""
    import requests  # tiktoken's own way out, slow to import and seldom needed

    response = requests.get(url, timeout=(5, 30))
    response.raise_for_status()
    return response.content


def without_lone_surrogates(text: str) -> str:
    """`text` as valid Unicode: halves of pairs are joined, lone ones become U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_long_blanks(text: str) -> list[str]:
    """`text` in parts, none with a run of white space of twice LONGEST_BLANK or more."""
    if len(text) < LONGEST_BLANK:
        return [text]
    cuts = {0, len(text)}
    for start in range(0, len(text), LONGEST_BLANK):
        if text[start : start + LONGEST_BLANK].isspace():
            cuts |= {start, min(start + LONGEST_BLANK, len(text))}
    edges = sorted(cuts)
    return [text[a:b] for a, b in itertools.pairwise(edges)]
