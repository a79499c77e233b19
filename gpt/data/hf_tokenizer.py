"""A tokenizer of another model, run by the library that its tokenizer.json was written for.

Nothing is translated: the file goes into our checkpoints and out again byte for byte, and the
`tokenizers` library encodes. What is ours is the bytes of each token, which streaming needs to hold
back half a character. Imports no JAX.
"""

import base64
import functools
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers as library

from gpt.errors import UserError

KIND = "huggingface"
FILE = "tokenizer.json"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


CHARACTER_OF_BYTE = byte_alphabet()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


class HFTokenizer:
    """A tokenizer.json with the methods that all tokenizers here have.

    files: the tokenizer.json and the files that came with it, by name, as bytes.
    n_vocab: ids of the model, of which the tokenizer may know fewer.
    special_ids: config.json's `bos_token_id`, `eos_token_id` (one id or several) and so on.
    eot_token: the id that ends a text.

    Text is encoded as it is: special tokens in it are ordinary text, and none is put around it.
    """

    name = KIND

    def __init__(
        self, files: Mapping[str, bytes], n_vocab: int, special_ids: Mapping[str, Any], eot: int
    ):
        self.files = dict(files)
        self.n_vocab = n_vocab
        self.special_ids = dict(special_ids)
        self.eot_token = eot
        self._ordinary = self._load(special_as_text=True)
        description = json.loads(self.files[FILE])
        decoder = description.get("decoder")
        self._decoders = [] if decoder is None else decoder.get("decoders", [decoder])
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in self._decoders)
        self._may_drop_characters = self._find_whether_it_drops(description["model"])

    def _load(self, special_as_text: bool) -> library.Tokenizer:
        """UserError if the library cannot read the file."""
        try:
            loaded = library.Tokenizer.from_str(self.files[FILE].decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{FILE} cannot be read: {reason}") from None
        loaded.no_truncation()
        loaded.no_padding()
        loaded.encode_special_tokens = special_as_text
        return loaded

    # ------------------------------------------------------------ text to ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it read as text; a lone surrogate becomes U+FFFD.

        UserError for a character that has no token, where the library would leave it out.
        """
        text = _valid_unicode(text)
        self._require_tokens(text)
        return self._ordinary.encode(text, add_special_tokens=False).ids

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text. The library chooses its threads itself."""
        texts = [_valid_unicode(text) for text in texts]
        for text in texts:
            self._require_tokens(text)
        encoded = self._ordinary.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` in which special tokens are found, as transformers reads it."""
        text = _valid_unicode(text)
        self._require_tokens(text)
        return self._with_special.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _with_special(self) -> library.Tokenizer:
        return self._load(special_as_text=False)

    def vocabulary(self) -> dict[str, int]:
        """Every token the library knows and its id."""
        return self._ordinary.get_vocab(with_added_tokens=True)

    def added_around(self) -> list[str]:
        """The special tokens that transformers puts around a text, and that are not added here."""
        return self._with_special.encode("", add_special_tokens=True).tokens

    def _find_whether_it_drops(self, model: dict[str, Any]) -> bool:
        """Whether the library may leave out characters without a word: a BPE does that if it has
        neither a token for the unknown, nor a fallback to bytes, nor every byte."""
        if model.get("type", "BPE") != "BPE":
            return False
        if model.get("unk_token") or model.get("byte_fallback"):
            return False
        has_all_bytes = model["vocab"].keys() >= set(CHARACTER_OF_BYTE.values())
        return not (self._is_byte_level and has_all_bytes)

    def _require_tokens(self, text: str) -> None:
        """UserError if a character of `text` would be left out."""
        if not self._may_drop_characters:
            return
        normalizer = self._ordinary.normalizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        for character in set(text):
            if self._is_byte_level:
                units = [CHARACTER_OF_BYTE[byte] for byte in character.encode()]
            else:
                units = [character]
            if any(self._ordinary.token_to_id(unit) is None for unit in units):
                raise UserError(
                    f"the tokenizer has no token for the character {character!r}: leave it out"
                )

    # ------------------------------------------------------------ ids to text

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may end within a character.

        A space that the tokenizer puts before a text is kept: a piece of a text cannot know whether
        it is the first. `decode` drops it.
        """
        return b"".join([self._token_bytes[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` as the library gives it, special tokens included."""
        return self._ordinary.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of every id of the model; those without a token get a name."""
        tokens = [self._ordinary.id_to_token(i) for i in range(self.n_vocab)]
        return [
            f"<|unused_{i}|>".encode() if token is None else _spell(token, self._decoders)
            for i, token in enumerate(tokens)
        ]

    # ------------------------------------------------------------ keeping it

    def contents(self) -> dict[str, Any]:
        """All that decides the ids, as plain JSON."""
        digest = hashlib.sha256(self.files[FILE]).hexdigest()
        return {"kind": KIND, FILE: digest, "n_vocab": self.n_vocab, "end": self.eot_token}

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON: `from_json` makes an equal tokenizer of it."""
        packed = {
            name: base64.b64encode(zlib.compress(data)).decode()
            for name, data in self.files.items()
        }
        return self.contents() | {"files": packed, "special_ids": self.special_ids}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "HFTokenizer":
        """The tokenizer of `to_json`'s values; UserError if they are not such."""
        try:
            packed = values["files"]
            files = {name: zlib.decompress(base64.b64decode(packed[name])) for name in packed}
            return cls(files, values["n_vocab"], values["special_ids"], values["end"])
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise UserError(f"the saved tokenizer cannot be used: {error!r}") from None


def _valid_unicode(text: str) -> str:
    """`text` with lone surrogates as U+FFFD: the library takes none."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _spell(token: str, decoders: list[dict[str, Any]]) -> bytes:
    """The bytes that a token adds to a text."""
    for step in decoders:
        match step:
            case {"type": "ByteLevel"}:
                if all(character in BYTE_OF_CHARACTER for character in token):
                    return bytes([BYTE_OF_CHARACTER[character] for character in token])
            case {"type": "ByteFallback"}:
                if byte := BYTE_TOKEN.fullmatch(token):
                    return bytes.fromhex(byte[1])
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                token = token.replace(old, new)
            case {"type": "Metaspace", "replacement": mark}:
                token = token.replace(mark, " ")
    return token.encode()
