"""How a tokenizer cuts text into pieces, as one regular expression for two engines.

tokenizers runs Oniguruma, tiktoken Rust's fancy-regex. What they read alike is let through, both
ways; the rest is refused. Knows no vocabulary.
"""

import re
from typing import Any

import tiktoken

from gpt.convert.fields import brief
from gpt.errors import UserError, require

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A digit, or a run of them, stands alone: no space before it, and blanks before it are whole.
WITH_DIGITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d|{digits}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLASS = r"\[\^?(?:\\[sSrntpP](?:\{\w+\})?+|\\[^\w\s]|[^\]\[\\&])+\]"
ONE = rf"(?:{CLASS}|\\[pP]\{{\w+\}}|\\[sSrntz]|\\[^\w\s]|[^\\\[\]{{}}()|?*+.^$])"
REPEATED = r"(?:[?*+](?:\+|\?)?|\{\d+(?:,\d*)?\}(?!\+))?"
# A group is there once or not at all: one that repeats may be tried in more ways than can be waited
# for, and no tokenizer that we know has one.
GROUP = r"\(\?(?:i?:|[=!])|[(|]|\)(?:\?[+?]?)?"
ALIKE = re.compile(rf"(?:{ONE}{REPEATED}|{GROUP})*")
PROBE = "a 1.\n今'S  \t\r\n"
COUNTED = re.compile(r"(\{\d+,\d+\})\+(?=\||$)")


def of_class(kind: str) -> tuple[str, str | None] | None:
    """Pattern and normal form of a tokenizer class, or of a model_type; None if it is unknown."""
    name = kind.removesuffix("Fast").removesuffix("Tokenizer").lower()
    return {"gpt2": (GPT2, None), "qwen2": (QWEN2, "NFC"), "qwen3": (QWEN2, "NFC")}.get(name)


def require_alike(pattern: str) -> str:
    """`pattern`; UserError unless both engines read it alike."""
    require(
        len(pattern) <= 2000 and ALIKE.fullmatch(pattern) is not None,
        f"the tokenizer's pattern {brief(pattern)} uses what two engines may read differently, "
        "or repeats a group",
    )
    return pattern


def read_pattern(values: Any) -> str:
    """The pattern of a tokenizer.json's pre_tokenizer; UserError for one with no counterpart."""
    steps = [values]
    if isinstance(values, dict) and values.get("type") == "Sequence":
        steps = values.get("pretokenizers")
    good = isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
    require(good, f"tokenizer.json: the pre_tokenizer is {brief(values)}")
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if uses_regex(steps[0]):
            return GPT2
        case ["Split", "ByteLevel"] if not uses_regex(steps[1]):
            return read_split(steps[0])
        case ["Digits", "ByteLevel"] if uses_regex(steps[1]):
            alone = steps[0].get("individual_digits") is True
            return WITH_DIGITS.format(digits=r"\p{N}" if alone else r"\p{N}+")
        case kinds:
            raise_unknown(kinds)


def raise_unknown(kinds: list) -> None:
    """UserError for steps of cutting that are not known together."""
    require(
        False,
        f"tokenizer.json: the pre_tokenizer is {brief(kinds)}: expected ByteLevel alone, or after "
        "one Split or Digits",
    )


def uses_regex(step: dict[str, Any]) -> bool:
    """Whether a ByteLevel step cuts by GPT-2's pattern; UserError if it adds a space."""
    require(
        step.get("add_prefix_space") is False,
        "tokenizer.json: add_prefix_space puts a space before a text, which is not done here",
    )
    return step.get("use_regex", True) is True


def read_split(step: dict[str, Any]) -> str:
    """The pattern of a Split step."""
    how = (step.get("behavior"), step.get("invert", False))
    require(
        how == ("Isolated", False), f"tokenizer.json: the pre_tokenizer's Split is {brief(how)}"
    )
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    require(isinstance(regex, str), f"tokenizer.json: Split has the pattern {brief(pattern)}")
    require(
        not fits_nothing(require_alike(regex)),
        f"the tokenizer's pattern {brief(regex)} also fits where there is no character",
    )
    return regex


def fits_nothing(pattern: str) -> bool:
    """Whether `pattern` finds empty pieces, at which tiktoken breaks; UserError if it finds none or
    has too many ways to try."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"": 256}
    try:
        probe = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return 256 in probe.encode_ordinary(PROBE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in tiktoken's Rust is no Exception
        raise UserError(
            f"the tokenizer's pattern {brief(pattern)} does not work: {error}"
        ) from None


def write_pattern(pattern: str) -> dict[str, Any]:
    """The pre_tokenizer that cuts text by one of our patterns."""
    # After a counted possessive that ends its branch nothing can fail, so it may be plain.
    regex = COUNTED.sub(r"\1", pattern.replace("++$", r"++\z"))
    split = {
        "type": "Split",
        "pattern": {"Regex": require_alike(regex)},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}
