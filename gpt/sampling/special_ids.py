"""Special token ids: those that end a text, precede it or must not be sampled."""

import json
import re
from dataclasses import dataclass

from gpt.data.hf_tokenizer import HFTokenizer
from gpt.data.tokenizers import END_OF_TEXT, IdTokenizer
from gpt.errors import require
from gpt.sampling.settings import Prefix

UNUSED = re.compile(r"<\|unused_\d+\|>")  # tokenizers.py's name for an id without a token


@dataclass(frozen=True)
class SpecialIds:
    """ends: ids that end a text; the first also serves as a prefix. before: what the tokenizer
    puts before a text. bos: config.json's beginning-of-text id. not_text: ids that represent no
    text. unused: ids without a token."""

    ends: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    bos: int | None = None
    not_text: frozenset[int] = frozenset()
    unused: tuple[int, ...] = ()

    def prefix(
        self, wanted: Prefix | None, before_ids: bool = False, is_needed: bool = False
    ) -> list[int]:
        """The ids to put before a text or, if `before_ids`, before a prompt given as ids.

        By default a text gets what its tokenizer adds, and ids get nothing; if that is empty and
        `is_needed`, they get end-of-text, which preceded every training document. UserError if the
        model lacks the `wanted` token.
        """
        if wanted == "bos":
            require(self.bos is not None, "prefix bos: the model has no beginning-of-text token")
            return [self.bos]
        if wanted == "eos":
            require(bool(self.ends), "prefix eos: the model has no end-of-text token")
            return [self.ends[0]]
        before = [] if before_ids or wanted == "none" else self.before
        if is_needed and not before and wanted is None:
            before = self.ends[:1]
        return list(before)


def find_special_ids(tokenizer) -> SpecialIds:
    """The special ids of any tokenizer from gpt/data/tokenizers.py."""
    eot = tokenizer.eot_token
    ends = (eot,) if eot >= 0 else ()
    if isinstance(tokenizer, IdTokenizer):
        return SpecialIds(ends, not_text=frozenset(range(tokenizer.n_vocab)))
    if not isinstance(tokenizer, HFTokenizer):
        names = getattr(tokenizer, "special_tokens", {END_OF_TEXT: eot})
        unused = [i for name, i in names.items() if UNUSED.fullmatch(name)]
        return SpecialIds(ends, not_text=frozenset(names.values()), unused=tuple(unused))

    # Every end-of-text id in config.json or generation_config.json.
    generation = json.loads(tokenizer.files.get("generation_config.json", "{}"))
    for named in (tokenizer.special_ids.get("eos_token_id"), generation.get("eos_token_id")):
        ends += tuple(named) if isinstance(named, list) else (named,)
    ends = dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < tokenizer.n_vocab)

    as_in_transformers = tokenizer.as_in_transformers
    encoded = as_in_transformers.encode("a", add_special_tokens=True)
    n_before = 0
    if 0 in encoded.special_tokens_mask:
        n_before = encoded.special_tokens_mask.index(0)
    added = as_in_transformers.get_added_tokens_decoder()
    known = set(as_in_transformers.get_vocab(with_added_tokens=True).values())
    before = tuple(encoded.ids[:n_before])
    return SpecialIds(
        ends=tuple(ends),
        before=before,
        bos=tokenizer.special_ids.get("bos_token_id", before[0] if before else None),
        not_text=frozenset(i for i, token in added.items() if token.special),
        unused=tuple(i for i in range(tokenizer.n_vocab) if i not in known),
    )
