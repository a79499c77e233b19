"""The tokenizer files of a Hugging Face folder, in and out.

A tokenizer.json that comes in stays what it is (gpt/data/hf_tokenizer.py). One of our own goes out
as a tokenizer.json that AutoTokenizer reads; it is checked by encoding a text with both.
"""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers as library
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from gpt.convert.hf_weights import read_json
from gpt.data import tokenizers
from gpt.data.hf_tokenizer import CHARACTER_OF_BYTE, HFTokenizer
from gpt.errors import UserError, is_of, require

# What is kept with the run beside tokenizer.json, and goes out again as it came.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Tokenizers in forms that the `tokenizers` library does not read.
OTHER_FORMS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>")
UNUSED = re.compile(r"<\|unused_\d+\|>")  # names that we gave to ids which have no token
SAMPLE = (
    "The cat sat on the mat; DON'T we'll 1234567 times.  \t\r\n\n   def f(x):\n        return x\n"
    "naïve café, e\u0301, 今天的天气很好，我们去公园。🙂👩‍👩‍👧 ½ ٣ ﬃ \u00a0\u3000x \x00"
)


# ---------------------------------------------------------------- coming in


def import_tokenizer(
    folder: Path, config: dict[str, Any], n_vocab: int, ids_only: bool, log: Callable[[str], None]
) -> tokenizers.Tokenizer:
    """The tokenizer of a model's folder, or that of ids alone where it has none.

    config: the folder's config.json. n_vocab: the model's number of ids. UserError if there is a
    tokenizer that cannot be read, or none of its tokens is known to end a text.
    """
    found = [
        name for name in ("tokenizer.json", "vocab.json", *OTHER_FORMS) if has_file(folder, name)
    ]
    if ids_only or not found:
        log("the model comes without a tokenizer: prompts are ids, as in --prompt-ids '1 2 3'")
        ends = [i for i in end_ids(config) if i < n_vocab]
        return tokenizers.IdTokenizer(n_vocab, ends[0] if ends else -1)
    try:
        return read_tokenizer(folder, found, config, n_vocab, log)
    except UserError as error:
        raise UserError(f"{error}; --ids-only imports the model without its tokenizer") from None


def read_tokenizer(
    folder: Path,
    found: list[str],
    config: dict[str, Any],
    n_vocab: int,
    log: Callable[[str], None],
) -> HFTokenizer:
    """The tokenizer.json of a folder, with the files that belong to it."""
    if "tokenizer.json" in found:
        content = (folder / "tokenizer.json").read_bytes()
    elif (
        has_file(folder, "vocab.json")
        and has_file(folder, "merges.txt")
        and config["model_type"] == "gpt2"
    ):
        content = gpt2_tokenizer_json(folder)
    else:
        raise UserError(
            f"{folder} has {', '.join(found)} but no tokenizer.json: load the tokenizer with "
            "AutoTokenizer of transformers, which can save one with save_pretrained(NEW_FOLDER)"
        )
    files = {name: (folder / name).read_bytes() for name in COMPANIONS if has_file(folder, name)}
    files["tokenizer.json"] = content

    special_ids = {
        name: config[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(name) is not None
    }
    tokenizer = HFTokenizer(files, n_vocab, special_ids, eot=-1)
    vocabulary = tokenizer.vocabulary()
    largest = max(vocabulary.values(), default=-1)
    require(
        0 <= largest < n_vocab,
        f"the largest id of the tokenizer is {largest}, and the model's vocabulary is {n_vocab:,}",
    )

    # The end of a text: what config.json or generation_config.json says, or else a usual name.
    ends = end_ids(config)
    if not ends and "generation_config.json" in files:
        ends = end_ids(read_json(folder / "generation_config.json"))
    ends = [i for i in ends if i < n_vocab]
    ends = ends or [vocabulary[name] for name in END_NAMES if name in vocabulary][:1]
    require(bool(ends), "no token ends a text: expected an eos_token_id in config.json")
    tokenizer.eot_token = ends[0]
    if len(ends) > 1:
        names = [repr(tokenizer.decode_bytes([i]).decode("utf-8", "replace")) for i in ends]
        log(f"{names[0]} ends a text; so would {', '.join(names[1:])}, at which nothing stops here")
    if around := tokenizer.added_around():
        log(
            f"transformers puts {' '.join(around)} around a text; nothing is added here: "
            "--prompt-ids can give it"
        )
    return tokenizer


def end_ids(config: dict[str, Any]) -> list[int]:
    """The ids that end a text, of which a config.json names one, several or none."""
    value = config.get("eos_token_id")
    ends = value if isinstance(value, list) else [value]
    return [i for i in ends if is_of(i, int) and i >= 0]


def gpt2_tokenizer_json(folder: Path) -> bytes:
    """The tokenizer.json of an old GPT-2's vocab.json and merges.txt."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"vocab.json and merges.txt cannot be read: {error}") from None
    made = library.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([name for name in END_NAMES if made.token_to_id(name) is not None])
    return made.to_str().encode()


def has_file(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


# ---------------------------------------------------------------- going out


def export_tokenizer(tokenizer: tokenizers.Tokenizer, context_length: int) -> dict[str, bytes]:
    """The files of a tokenizer by name; none for one of ids alone.

    UserError if no tokenizer.json gives the same ids.
    """
    if isinstance(tokenizer, tokenizers.IdTokenizer):
        return {}
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.files

    if isinstance(tokenizer, tokenizers.CharTokenizer):
        made = character_tokenizer(tokenizer)
        end = tokenizers.END_OF_TEXT
        sample = tokenizer.characters * 2
    else:
        made = byte_level_tokenizer(tokenizer)
        end = tokenizers.END_OF_TEXT
        tokens = tokenizer.ranks
        sample = SAMPLE + " ".join(token.decode("utf-8", "ignore") for token in tokens)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(about, indent=2).encode(),
    }
    back = HFTokenizer(files, tokenizer.n_vocab, {}, tokenizer.eot_token)
    require(
        back.encode_ordinary(sample) == tokenizer.encode_ordinary(sample),
        "the tokenizer cannot be exported: no tokenizer.json gives the same ids for a sample text",
    )
    return files


def byte_level_tokenizer(tokenizer: tokenizers.ByteLevelTokenizer) -> library.Tokenizer:
    """The library's tokenizer for a tiktoken encoding."""
    ranks = tokenizer.ranks
    merges, ignore_merges = recover_merges(ranks)

    def spell(token: bytes) -> str:
        return "".join(CHARACTER_OF_BYTE[byte] for byte in token)

    special = {
        text: i for text, i in tokenizer.special_tokens.items() if not UNUSED.fullmatch(text)
    }
    made = library.Tokenizer(
        models.BPE(
            # A special token that the vocabulary lacked would get another id.
            vocab={spell(token): i for token, i in ranks.items()} | special,
            merges=[(spell(a), spell(b)) for a, b in merges],
            ignore_merges=ignore_merges,
        )
    )
    # Oniguruma reads two things otherwise than tiktoken's engine: "{1,3}+" repeats a repetition
    # (where nothing can fail after it, it may be plain), and "$" also stands before a last newline.
    pattern = re.sub(r"(\{\d+,\d+\})\+(?=\||$)", r"\1", tokenizer.pattern)
    pattern = pattern.replace("++$", r"++\z")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    by_id = sorted(special, key=special.__getitem__)
    made.add_special_tokens([AddedToken(text, normalized=False) for text in by_id])
    return made


def character_tokenizer(tokenizer: tokenizers.CharTokenizer) -> library.Tokenizer:
    """The library's tokenizer for single characters: a BPE that never merges."""
    vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
    vocabulary[tokenizers.END_OF_TEXT] = tokenizer.eot_token
    made = library.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(tokenizers.END_OF_TEXT, normalized=False)])
    return made


def recover_merges(ranks: dict[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The merges of a byte-level BPE from its tokens' ranks, in order; and whether a word that is a
    token must be taken whole.

    tiktoken joins the two neighbours whose union has the lowest rank. A token was therefore made
    from the two parts into which it falls when only lower ranks are joined. Some tokens (21 of
    Llama 3's) fall into more parts: they are reached only by being looked up as a whole, or from
    any two tokens that make them up.
    """
    merges = []
    ignore_merges = False
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = join_lower_ranks(token, ranks)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            ignore_merges = True
            cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
            merges += [(a, b) for a, b in cuts if a in ranks and b in ranks]
    return merges, ignore_merges


def join_lower_ranks(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of `token` after joining all neighbours that rank below it, lowest first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        unions = [ranks.get(a + b, ranks[token]) for a, b in pairwise(parts)]
        lowest = min(unions, default=ranks[token])
        if lowest == ranks[token]:
            return parts
        i = unions.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
