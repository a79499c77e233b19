"""Tokens that stand beside a vocabulary: special ones and their ids, and the one that ends a text.

Three files may name them. Knows no merges and no pattern.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpt.convert import strict_json
from gpt.convert.fields import brief
from gpt.convert.tokenizers_out import UNUSED
from gpt.errors import is_of, require

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")


def read_list(values: dict[str, Any], form: str | None) -> dict[str, int]:
    """The added tokens of a tokenizer.json with their ids."""
    tokens = values.get("added_tokens") or []
    require(isinstance(tokens, list), f"tokenizer.json: added_tokens is {brief(tokens)}")
    found = gather(map(read_one, tokens))
    late = [token["content"] for token in tokens if form and token.get("normalized")]
    require(not late, f"the added token {brief(late)} is sought in a text's {form}, here before it")
    return found


def read_one(token: Any, i: Any = None) -> tuple[str, int]:
    """One added token; UserError if it also takes the white space around it, or is half a word."""
    require(isinstance(token, dict), f"the added token {brief(token)} is no object")
    text, i = token.get("content"), token.get("id") if i is None else i
    good = isinstance(text, str) and text != "" and is_of(i, int) and i >= 0
    require(good, f"the added token {brief(token)} has no text or no id")
    odd = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
    require(not odd, f"the added token {text!r} is {' and '.join(odd)}, which is not known here")
    return text, i


def gather(tokens: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Ids by text; UserError if a text has two, or a name that ids without a token are given."""
    found: dict[str, int] = {}
    for text, i in tokens:
        first = found.setdefault(text, i)
        require(first == i, f"the files give the token {text!r} the ids {first} and {i}")
        require(not UNUSED.fullmatch(text), f"the token {text!r} bears a name that is ours")
    return found


def require_clear(added: dict[str, int]) -> None:
    """UserError if one added token begins another: theirs finds the longer one, ours the first."""
    inside = [a for a, b in pairwise(sorted(added)) if b.startswith(a)]
    require(not inside, f"the added token {brief(inside)} begins another: only one can be found")


def read_others(folder: Path, about: dict[str, Any]) -> list[tuple[str, int]]:
    """Tokens that other files add: the ids in tokenizer_config.json, added_tokens.json."""
    table = about.get("added_tokens_decoder") or {}
    good = isinstance(table, dict) and all(i.isdecimal() and len(i) < 10 for i in table)
    require(good, "tokenizer_config.json: added_tokens_decoder is no object of ids")
    found = [read_one(token, int(i)) for i, token in table.items()]
    if (folder / "added_tokens.json").exists():
        added = strict_json.read(folder / "added_tokens.json", strict_json.LONGEST)
        found += read_ids(added, "added_tokens.json").items() if added else ()
    return found


def read_ids(values: Any, what: str) -> dict[str, int]:
    """Tokens and their ids, each id once."""
    good = isinstance(values, dict) and all(is_of(i, int) and i >= 0 for i in values.values())
    require(good and values != {}, f"the tokenizer's {what} is no object of tokens and ids")
    require(len(set(values.values())) == len(values), f"the tokenizer's {what} has an id twice")
    return values


def ends_of(config: dict[str, Any]) -> list[int]:
    """The ids that end a text, as config.json has them: one, several or none."""
    value = config.get("eos_token_id")
    ends = value if isinstance(value, list) else [value]
    return [i for i in ends if is_of(i, int) and i >= 0]


def choose_end(
    folder: Path, config: dict[str, Any], added: dict[str, int], tell: Callable[[str], None]
) -> str:
    """The special token that ends a text: config.json's, or else one of a usual name."""
    names = {i: text for text, i in added.items()}
    ends = [i for i in ends_of(config) if i in names]
    if len(ends) > 1:
        first, *others = (names[i] for i in ends)
        tell(f"{first!r} ends a text; config.json also names {brief(others)}, at which none stops")
    found = [names[i] for i in ends] or [text for text in ENDS if text in added]
    require(
        bool(found),
        f"no special token ends a text: config.json's eos_token_id is "
        f"{brief(config.get('eos_token_id'))}, expected one of {brief(sorted(names)[:9])}",
    )
    return found[0]
