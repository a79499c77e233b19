"""A tokenizer in the Hugging Face form as a tiktoken.Encoding with the same ids, or the reason why
there is none.

tokenizer.json says all; older folders have vocab.json and merges.txt, and what the class named in
tokenizer_config.json makes of them. Knows nothing of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.convert import added, bpe, pieces, strict_json, tokenizers_out
from gpt.convert.fields import brief
from gpt.data import tokenizers
from gpt.errors import UserError, require

FILES = ("tokenizer.json", "vocab.json", "merges.txt")
OTHERS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "qwen.tiktoken",
)
IDS_ONLY = "; --ids-only imports the model without its tokenizer"


@dataclass
class Vocabulary:
    """A byte-level BPE as files describe it: spelled tokens, pairs, added tokens by their text."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    pattern: str
    form: str | None = None
    whole: bool = False
    added: dict[str, int] = field(default_factory=dict)


def read(
    folder: Path, config: dict[str, Any], n_vocab: int, ids_only: bool, tell: Callable[[str], None]
) -> tokenizers.Tokenizer:
    """The tokenizer of a model's folder with `n_vocab` ids; of ids alone where it has none.

    `config`: its config.json. `tell` hears what it does not do. UserError where it cannot be
    represented to the last id.
    """
    there = [name for name in (*FILES, *OTHERS) if (folder / name).exists()]
    if ids_only or not there:
        ends = added.ends_of(config)
        tell("without a tokenizer: prompts are ids, as in --prompt-ids '1 2 3'")
        end = ends[0] if ends and ends[0] < n_vocab else -1
        return tokenizers.IdTokenizer(n_vocab, end)
    try:
        if ours := single_characters(folder, n_vocab):
            return ours
        vocabulary = read_vocabulary(folder, config, there, tell)
        return encoding(folder, vocabulary, config, n_vocab, tell)
    except UserError as error:
        raise UserError(f"{error}{IDS_ONLY}") from None


def single_characters(folder: Path, n_vocab: int) -> tokenizers.CharTokenizer | None:
    """The tokenizer of `n_vocab` - 1 characters whose export the folder's tokenizer.json is, to the
    last field; None for any other."""
    if not (folder / "tokenizer.json").exists():
        return None
    values = strict_json.read(folder / "tokenizer.json", strict_json.LONGEST)
    model = values.get("model")
    ids = model.get("vocab") if isinstance(model, dict) else None
    found = {i: text for text, i in ids.items() if type(i) is int} if isinstance(ids, dict) else {}
    characters = [found.get(i, "") for i in range(n_vocab - 1)]
    good = all(len(one) == 1 and not "\ud800" <= one <= "\udfff" for one in characters)
    if not good or characters != sorted(characters):
        return None
    made = tokenizers.CharTokenizer("".join(characters))
    return made if values == tokenizers_out.describe(made)[0] else None


def read_vocabulary(
    folder: Path, config: dict[str, Any], there: list[str], tell: Callable[[str], None]
) -> Vocabulary:
    """What the files of a folder say, in whichever form they are."""
    about = {}
    if (folder / "tokenizer_config.json").exists():
        about = strict_json.read(folder / "tokenizer_config.json", strict_json.LONGEST)
    require(
        not about.get("add_prefix_space"),
        "tokenizer_config.json: add_prefix_space is true: here no space is put before a text",
    )
    if "tokenizer.json" in there:
        found = from_tokenizer_json(
            strict_json.read(folder / "tokenizer.json", strict_json.LONGEST), tell
        )
    else:
        both = "vocab.json" in there and "merges.txt" in there
        require(
            both,
            f"the tokenizer in {', '.join(there)} is no byte-level BPE that can be read: expected "
            "tokenizer.json, or vocab.json and merges.txt",
        )
        found = from_pair(folder, str(about.get("tokenizer_class") or config["model_type"]))
    found.added = added.gather([*found.added.items(), *added.read_others(folder, about)])
    return found


def from_tokenizer_json(values: dict[str, Any], tell: Callable[[str], None]) -> Vocabulary:
    """A tokenizer.json; UserError for each part that has no counterpart here."""
    model = part(values, "model")
    for name, allowed in {
        "type": ("BPE", None),
        "dropout": (None, 0, 0.0),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "byte_fallback": (None, False),
        "fuse_unk": (None, False),
    }.items():
        value = model.get(name)
        require(value in allowed, f"tokenizer.json: the model's {name} is {brief(value)}")
    decoder = part(values, "decoder").get("type")
    require(
        decoder == "ByteLevel", f"tokenizer.json: the decoder is {brief(decoder)}, no ByteLevel"
    )
    whole = model.get("ignore_merges") or False
    require(isinstance(whole, bool), "tokenizer.json: ignore_merges is neither true nor false")
    if adds_tokens(values.get("post_processor")):
        tell("the tokenizer of transformers adds special tokens to a text; here none is added")
    pattern, form = pieces.read_pattern(values.get("pre_tokenizer")), read_form(values)
    ids, merges = added.read_ids(model.get("vocab"), "vocab"), read_merges(model.get("merges"))
    return Vocabulary(ids, merges, pattern, form, whole, added.read_list(values, form))


def part(values: dict[str, Any], name: str) -> dict[str, Any]:
    """An object in a tokenizer.json; UserError if it is none."""
    found = values.get(name)
    require(isinstance(found, dict), f"tokenizer.json: {name} is {brief(found)}")
    return found


def adds_tokens(after: Any) -> bool:
    """Whether a post_processor may put tokens around a text."""
    inner = after.get("processors") if isinstance(after, dict) else None
    steps = inner if isinstance(inner, list) else [after]
    return any(
        step and not (isinstance(step, dict) and step.get("type") == "ByteLevel") for step in steps
    )


def read_form(values: dict[str, Any]) -> str | None:
    """The normal form of a tokenizer.json: NFC or none."""
    found = values.get("normalizer")
    if isinstance(found, dict) and found.get("type") == "Sequence":
        inner = found.get("normalizers")
        found = inner[0] if isinstance(inner, list) and len(inner) == 1 else found
    require(
        found is None or found == {"type": "NFC"},
        f"tokenizer.json: the normalizer is {brief(found)}: only NFC or none is known",
    )
    return found and "NFC"


def read_merges(values: Any) -> list[tuple[str, str]]:
    """The pairs, written "a b" or [a, b]."""
    require(isinstance(values, list), "the tokenizer has no list of merges")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in values]
    good = all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs)
    require(
        good and all(isinstance(half, str) for p in pairs for half in p),
        "the tokenizer's merges are no pairs of tokens",
    )
    require(len({*map(tuple, pairs)}) == len(pairs), "the tokenizer's merges have a pair twice")
    return [(first, second) for first, second in pairs]


def from_pair(folder: Path, kind: str) -> Vocabulary:
    """vocab.json and merges.txt, cut into pieces as the tokenizer class `kind` does."""
    known = pieces.of_class(kind)
    require(
        known is not None,
        f"there is no tokenizer.json, and how a {brief(kind)} cuts text is not known",
    )
    ids = added.read_ids(strict_json.read(folder / "vocab.json", strict_json.LONGEST), "vocab.json")
    text = strict_json.read_bytes(folder / "merges.txt", strict_json.LONGEST).decode(
        errors="replace"
    )
    lines = [line for line in text.splitlines() if line and not line.startswith("#version")]
    special = {text: i for text, i in ids.items() if text in added.ENDS}
    return Vocabulary(ids, read_merges(lines), *known, added=special)


def encoding(
    folder: Path,
    found: Vocabulary,
    config: dict[str, Any],
    n_vocab: int,
    tell: Callable[[str], None],
) -> tokenizers.Tokenizer:
    """The tiktoken.Encoding of a vocabulary, proved to give the same ids."""
    for text, i in found.added.items():
        as_word = found.ids.get(text, i)
        require(as_word == i, f"the token {text!r} has the ids {as_word} and {i}")
    ordinary = {text: i for text, i in found.ids.items() if text not in found.added}
    ranks = {unspelled(text): i for text, i in ordinary.items()}
    everything = set(found.added.values()) | set(ranks.values())
    distinct = len(everything) == len(found.added) + len(ranks)
    require(distinct, "an added token of the tokenizer has the id of another token")
    require(
        max(everything) < n_vocab,
        f"the tokenizer has the id {max(everything)}, the model's vocabulary only {n_vocab:,}",
    )
    added.require_clear(found.added)
    tell_lacking(ranks, tell)
    pairs = [(unspelled(a), unspelled(b)) for a, b in found.merges]
    bpe.require_same(pairs, ranks, found.whole)
    special = tokenizers.with_unused(found.added, ranks.values(), n_vocab)
    tokens = sorted(ranks, key=ranks.__getitem__)
    end = added.choose_end(folder, config, found.added, tell)
    return tokenizers.build("imported", found.pattern, tokens, special, end=end, form=found.form)


def tell_lacking(ranks: dict[bytes, int], tell: Callable[[str], None]) -> None:
    """Say which bytes have no token; UserError if a longer token is made of one."""
    lacking = b"".join(tokenizers.lacking_bytes(ranks))
    holding = [token for token in ranks if set(lacking) & set(token)]
    require(
        not holding,
        f"the token {bpe.spell(min(holding or [b'']))!r} holds a byte that has no token itself",
    )
    if lacking:
        named = lacking.hex(" ")
        tell(f"the tokenizer has no token for the bytes {named}: a text with one is refused")


def unspelled(text: str) -> bytes:
    """The bytes of a spelled token; UserError if it is not spelled as byte-level ones are."""
    try:
        return bpe.unspell(text)
    except KeyError:
        raise UserError(
            f"the token {text[:60]!r} is not spelled in bytes: no byte-level BPE"
        ) from None
