"""Another model's tokenizer, run by the library its tokenizer.json was written for.

Nothing is translated: checkpoints and exports contain the file byte for byte, and the `tokenizers`
library encodes. We add only each token's bytes, which streaming needs to hold back an incomplete
character. Imports no JAX.
"""

import base64
import functools
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers as library
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers

from gpt.errors import UserError, one_line, require

KIND = "huggingface"
FILE = "tokenizer.json"
PAIR = ("vocab.json", "merges.txt")
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# A byte-level vocabulary (GPT-2's) writes each byte as a printable character: as itself if it is
# printable, and otherwise as the next character from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTER_OF_BYTE = {byte: chr(byte) for byte in PRINTABLE}
CHARACTER_OF_BYTE |= {byte: chr(0x100 + i) for i, byte in enumerate(OTHERS)}
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


def load_library(content: bytes) -> library.Tokenizer:
    """Load a tokenizer.json with the library; UserError if that fails."""
    try:
        loaded = library.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{FILE} cannot be read: {one_line(error)}") from None
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def open_file(path: Path) -> "HFTokenizer":
    """The tokenizer in a tokenizer.json, for training a model; UserError if it cannot be used.

    The token that ends a text is the `eos_token` of a tokenizer_config.json next to it, or else
    one with a common name.
    """
    files = {FILE: path.read_bytes()}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if path.with_name(name).is_file():
            files[name] = path.with_name(name).read_bytes()
    return from_files(files)


def open_pair(folder: Path) -> "HFTokenizer":
    """The byte-level BPE in a folder's vocab.json and merges.txt, GPT-2's original format."""
    paths = [folder / name for name in PAIR]
    missing = [path.name for path in paths if not path.is_file()]
    require(not missing, f"{folder} holds no {FILE}, and no {' and no '.join(missing)}")
    try:
        made = library.Tokenizer(library.models.BPE.from_file(*map(str, paths)))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{paths[0]} and {paths[1].name} cannot be read: {error}") from None
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    end = next((name for name in END_NAMES if made.token_to_id(name) is not None), END_NAMES[0])
    made.add_special_tokens([library.AddedToken(end, normalized=False)])
    return from_files({FILE: made.to_str().encode()})


def from_files(files: dict[str, bytes]) -> "HFTokenizer":
    """A tokenizer from its own files, without a model's config."""
    vocabulary = load_library(files[FILE]).get_vocab(with_added_tokens=True)
    eot = find_end(files, vocabulary)
    n_vocab = max(vocabulary.values()) + 1
    return HFTokenizer(files, n_vocab, {"bos_token_id": eot, "eos_token_id": eot}, eot)


def find_end(files: dict[str, bytes], vocabulary: dict[str, int]) -> int:
    """The token that ends a text, from the tokenizer's files alone."""
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    end = config.get("eos_token")
    if isinstance(end, dict):
        end = end.get("content")
    ends = [vocabulary[name] for name in (end, *END_NAMES) if name in vocabulary]
    require(
        bool(ends),
        f"no token of {FILE} is known to end a text: name one as eos_token in a "
        "tokenizer_config.json next to it",
    )
    return ends[0]


class HFTokenizer:
    """A tokenizer.json with the methods of our other tokenizers.

    files: the tokenizer.json and the files that came with it, by name, as bytes.
    n_vocab: the model's vocabulary size; the tokenizer may know fewer ids.
    special_ids: config.json's `bos_token_id`, `eos_token_id` (one id or several) and so on.
    eot_token: the id that ends a text.

    Text is encoded as is: special tokens in it are ordinary text, and none are added around it. As
    in transformers, added tokens that are not special are recognized, and a character without a
    token is dropped if the tokenizer has no unknown token. UserError if the library cannot read the
    file.
    """

    name = KIND

    def __init__(
        self, files: Mapping[str, bytes], n_vocab: int, special_ids: Mapping[str, Any], eot: int
    ):
        self.files = dict(files)
        self.n_vocab = n_vocab
        self.special_ids = dict(special_ids)
        self.eot_token = eot
        self.contents = {
            "kind": KIND,
            FILE: hashlib.sha256(self.files[FILE]).hexdigest(),
            "n_vocab": n_vocab,
            "end": eot,
        }
        self._ordinary = load_library(self.files[FILE])
        self._ordinary.encode_special_tokens = True  # as if they were ordinary text

    # ------------------------------------------------------------ text to ids

    def encode_ordinary(self, text: str) -> list[int]:
        return self._ordinary.encode(text, add_special_tokens=False).ids

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text. The library chooses its own number of threads."""
        encoded = self._ordinary.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    @functools.cached_property
    def as_in_transformers(self) -> library.Tokenizer:
        """The library's tokenizer, which recognizes special tokens in text and can add its own."""
        return load_library(self.files[FILE])

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, recognizing special tokens as transformers does."""
        return self.as_in_transformers.encode(text, add_special_tokens=False).ids

    # ------------------------------------------------------------ ids to text

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may end within a character.

        A space the tokenizer puts before a text is kept, since a piece of text cannot know whether
        it is the first. `decode` drops it.
        """
        return b"".join([self._token_bytes[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` as decoded by the library, special tokens included."""
        return self._ordinary.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of each of the model's ids; ids without a token get a name."""
        decoder = json.loads(self.files[FILE]).get("decoder") or {"decoders": []}
        steps = decoder.get("decoders", [decoder])
        tokens = [self._ordinary.id_to_token(i) for i in range(self.n_vocab)]
        return [
            f"<|unused_{i}|>".encode() if token is None else spell(token, steps)
            for i, token in enumerate(tokens)
        ]

    # ------------------------------------------------------------ saving and loading

    def files_as_json(self) -> dict[str, Any]:
        """What `from_json` needs besides `contents`."""
        packed = {
            name: base64.b64encode(zlib.compress(data)).decode()
            for name, data in self.files.items()
        }
        return {"files": packed, "special_ids": self.special_ids}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "HFTokenizer":
        """The tokenizer with these contents and files; UserError if the files are damaged."""
        packed = values["files"]
        files = {name: zlib.decompress(base64.b64decode(packed[name])) for name in packed}
        tokenizer = cls(files, values["n_vocab"], values["special_ids"], values["end"])
        require(
            tokenizer.contents[FILE] == values[FILE],
            f"the saved tokenizer is damaged: its {FILE} does not match its digest",
        )
        return tokenizer


def spell(token: str, decoders: list[dict[str, Any]]) -> bytes:
    """The bytes that a token stands for, by the decoder steps of a tokenizer.json."""
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
