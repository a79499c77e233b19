"""Our tokenizers as tokenizer.json and tokenizer_config.json, which AutoTokenizer reads.

Knows nothing of weights.
"""

import json
import re
from pathlib import Path
from typing import Any

from gpt.convert import bpe, pieces
from gpt.data import tokenizers

UNUSED = re.compile(r"<\|unused_\d+\|>")  # names that we gave to ids which nothing has


def write(tokenizer: tokenizers.Tokenizer, folder: Path, context_length: int) -> None:
    """Write the tokenizer's files into `folder`; none for one of ids alone.

    UserError if there is no tokenizer.json that gives the same ids.
    """
    if isinstance(tokenizer, tokenizers.IdTokenizer):
        return
    values, end = describe(tokenizer)
    write_json(folder / "tokenizer.json", values)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", about)


def describe(tokenizer: tokenizers.Tokenizer) -> tuple[dict[str, Any], str]:
    """The tokenizer.json of a tokenizer that has text, and its end-of-text."""
    if isinstance(tokenizer, tokenizers.CharTokenizer):
        special = {tokenizers.END_OF_TEXT: tokenizer.eot_token}
        values, end = describe_characters(tokenizer, special), tokenizers.END_OF_TEXT
    else:
        named = tokenizer._special_tokens.items()
        special = {text: i for text, i in named if not UNUSED.fullmatch(text)}
        values, end = describe_bytes(tokenizer, special), tokenizer.end
    head = {"version": "1.0", "truncation": None, "padding": None}
    body = {"added_tokens": [added(*one) for one in sorted(special.items(), key=lambda s: s[1])]}
    return head | body | values, end


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def added(text: str, i: int) -> dict[str, Any]:
    """A special token, as tokenizer.json lists it."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **plain, "special": True}


def model(vocabulary: dict[str, int], merges: list, whole: bool) -> dict[str, Any]:
    """The BPE of a tokenizer.json. A special token that its vocabulary lacks would get a new id."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": whole,
        "vocab": vocabulary,
        "merges": merges,
    }


def describe_bytes(
    tokenizer: tokenizers.ByteLevelTokenizer, special: dict[str, int]
) -> dict[str, Any]:
    """A byte-level BPE."""
    ranks = tokenizer._mergeable_ranks
    merges, whole = bpe.list_merges(ranks)
    spelled = {bpe.spell(token): i for token, i in ranks.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": False}
    return {
        "normalizer": tokenizer.form and {"type": tokenizer.form},
        "pre_tokenizer": pieces.write_pattern(tokenizer._pat_str),
        "post_processor": level,
        "decoder": level,
        "model": model(spelled | special, [[bpe.spell(a), bpe.spell(b)] for a, b in merges], whole),
    }


def describe_characters(
    tokenizer: tokenizers.CharTokenizer, special: dict[str, int]
) -> dict[str, Any]:
    """A BPE that never joins: each character is a token. Others are left out by transformers."""
    ids = {character: i for i, character in enumerate(tokenizer.characters)}
    parts = {"normalizer": None, "pre_tokenizer": None, "post_processor": None}
    return parts | {"decoder": {"type": "Fuse"}, "model": model(ids | special, [], False)}
