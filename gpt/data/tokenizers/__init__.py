"""Text to token ids and back: bytes, characters, a trained BPE, OpenAI's encodings.

Knows nothing of models, data files or JAX. A tokenizer here is a `tiktoken.Encoding` (or a small
class with the same methods: characters, or ids alone) whose ids are 0..n_vocab-1 without a gap, so
that any id a model can produce decodes; one of them ends a text, and no text ever encodes to it.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from gpt.data.tokenizers.encodings import (
    END_OF_TEXT,
    OPENAI_FILES,
    ByteLevelTokenizer,
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
    byte_tokenizer,
    lacking_bytes,
    learn_characters,
    openai_encoding,
    train_bpe,
    with_unused,
    without_lone_surrogates,
)
from gpt.data.tokenizers.saved import build, digest, from_json, load, save, to_json
from gpt.errors import require

__all__ = [
    "END_OF_TEXT",
    "ByteLevelTokenizer",
    "CharTokenizer",
    "IdTokenizer",
    "Tokenizer",
    "build",
    "create",
    "digest",
    "from_json",
    "lacking_bytes",
    "load",
    "save",
    "to_json",
    "with_unused",
    "without_lone_surrogates",
]

NAMES = ("byte", "char", "bpe", *OPENAI_FILES)


def create(name: str, documents: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """The tokenizer called `name` (byte, char, bpe, an OpenAI encoding), or saved in that file.

    `documents` yields the training text, for char and bpe alone; `vocab_size` is bpe's number of
    ids, end-of-text included. Raises UserError for a wrong name, file, size or missing download.
    """
    if name == "byte":
        return byte_tokenizer()
    if name == "char":
        return learn_characters(documents())
    if name == "bpe":
        return train_bpe(documents(), vocab_size)
    if name in OPENAI_FILES:
        return openai_encoding(name)
    require(
        os.path.isfile(name),
        f"no tokenizer is called {name!r} and no file either: "
        f"expected one of {', '.join(NAMES)}, or the path of a saved tokenizer",
    )
    return load(Path(name))
