"""Import and export the tokenizer files of a Hugging Face folder.

An imported tokenizer.json is kept unchanged (gpt/data/hf_tokenizer.py). Our own tokenizers are
exported as a tokenizer.json for AutoTokenizer, checked by encoding a text with both.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers as library
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from gpt.convert.hf_weights import read_json
from gpt.data import tokenizers
from gpt.data.hf_tokenizer import CHARACTER_OF_BYTE, FILE, HFTokenizer, find_end, load_library
from gpt.errors import UserError, is_of, require

# Files kept with the run besides tokenizer.json, and exported unchanged.
GENERATION = "generation_config.json"
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
# Tokenizer formats that the `tokenizers` library cannot read by itself.
OTHER_FORMS = ("vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
SAMPLE = (
    "The cat sat on the mat; DON'T we'll 1234567 times.  \t\r\n\n   def f(x):\n        return x\n"
    "naïve café, e\u0301, 今天的天气很好，我们去公园。🙂👩‍👩‍👧 ½ ٣ ﬃ \u00a0\u3000x \x00"
)


def import_tokenizer(
    folder: Path, config: dict[str, Any], n_vocab: int, ids_only: bool, log: Callable[[str], None]
) -> tokenizers.Tokenizer:
    """The tokenizer of a model folder, or an IdTokenizer if it has none.

    config: the folder's config.json. n_vocab: the model's vocabulary size. UserError if there is a
    tokenizer that cannot be read, or if none of its tokens is known to end a text.
    """
    found = [name for name in (FILE, *OTHER_FORMS) if (folder / name).is_file()]
    ends = end_ids(config, n_vocab)
    if ids_only or not found:
        log("the model comes without a tokenizer: prompts are ids, as in --prompt-ids '1 2 3'")
        return tokenizers.IdTokenizer(n_vocab, ends[0] if ends else -1)

    try:
        require(
            FILE in found,
            f"{folder} has {', '.join(found)} but no {FILE}: load the tokenizer with transformers' "
            "AutoTokenizer and save it with save_pretrained(NEW_FOLDER)",
        )
        names = [name for name in (FILE, *COMPANIONS) if (folder / name).is_file()]
        files = {name: (folder / name).read_bytes() for name in names}
        vocabulary = load_library(files[FILE]).get_vocab(with_added_tokens=True)
        largest = max(vocabulary.values(), default=-1)
        require(
            0 <= largest < n_vocab,
            f"the largest id of the tokenizer is {largest}, but the model's vocabulary has "
            f"only {n_vocab:,}",
        )
        if GENERATION in files:
            generation = read_json(folder / GENERATION)
            ends += [i for i in end_ids(generation, n_vocab) if i not in ends]
        ends = ends or [find_end(files, vocabulary)]
    except (UserError, ValueError) as error:
        raise UserError(f"{error}; --ids-only imports the model without its tokenizer") from None

    special_ids = {
        name: config[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(name) is not None
    }
    tokenizer = HFTokenizer(files, n_vocab, special_ids, ends[0])
    if len(ends) > 1:
        texts = [repr(tokenizer.decode_bytes([i]).decode("utf-8", "replace")) for i in ends]
        log(f"each of {', '.join(texts)} ends a text")
    return tokenizer


def end_ids(config: dict[str, Any], n_vocab: int) -> list[int]:
    """The ids that end a text; a file may name one, several or none."""
    value = config.get("eos_token_id")
    ends = value if isinstance(value, list) else [value]
    return [i for i in ends if is_of(i, int) and 0 <= i < n_vocab]


def export_tokenizer(tokenizer: tokenizers.Tokenizer, context_length: int) -> dict[str, bytes]:
    """A tokenizer's files by name; none for an IdTokenizer.

    UserError if no tokenizer.json gives the same ids.
    """
    if isinstance(tokenizer, tokenizers.IdTokenizer):
        return {}
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.files

    end = tokenizers.END_OF_TEXT
    if isinstance(tokenizer, tokenizers.CharTokenizer):
        # A BPE that never merges.
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
        made = library.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        made.decoder = decoders.Fuse()
        made.add_special_tokens([AddedToken(end, normalized=False)])
        sample = tokenizer.characters * 2
    else:
        made = byte_level_tokenizer(tokenizer)
        tokens = [token.decode("utf-8", "ignore") for token in tokenizer.tokens]
        sample = SAMPLE + " ".join(tokens)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        FILE: made.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(about, indent=2).encode(),
    }
    back = HFTokenizer(files, tokenizer.n_vocab, {}, tokenizer.eot_token)
    require(
        back.encode_ordinary(sample) == tokenizer.encode_ordinary(sample)
        and made.token_to_id(end) == tokenizer.eot_token,
        f"the tokenizer cannot be exported: no {FILE} gives the same ids for a sample text",
    )
    return files


def byte_level_tokenizer(tokenizer: tokenizers.ByteLevelTokenizer) -> library.Tokenizer:
    """The `tokenizers` equivalent of a tiktoken encoding.

    tiktoken merges the two neighbours whose union has the lowest rank; the library merges those
    that come first in a list of merges. So every split of a token into two tokens is listed, in the
    order of the tokens' ranks. Both first check whether a whole piece of text is a token.
    """
    spelled = {
        token: "".join(CHARACTER_OF_BYTE[byte] for byte in token) for token in tokenizer.tokens
    }
    merges = [
        (spelled[token[:i]], spelled[token[i:]])
        for token in spelled
        for i in range(1, len(token))
        if token[:i] in spelled and token[i:] in spelled
    ]
    vocabulary = {text: i for i, text in enumerate(spelled.values())}
    made = library.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))

    # Oniguruma reads two things differently from tiktoken's engine: "{1,3}+" repeats a repetition
    # (if nothing after it can fail, drop the "+"), and "$" also matches before a last newline.
    pattern = re.sub(r"(\{\d+,\d+\})\+(?=\||$)", r"\1", tokenizer.pattern)
    pattern = pattern.replace("++$", r"++\z")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    # The library assigns them the next free ids.
    special = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    made.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return made
