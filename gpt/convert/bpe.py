"""Two ways to write one byte-level BPE, and the proof that they are one.

tiktoken joins the two neighbours whose union has the lowest rank. A tokenizer.json lists pairs, and
joins the neighbours that stand first in the list. They agree on every text if each token, read by
the tokens of lower rank alone, falls into the two halves that the list joins to it: then no other
pair of neighbours ever has that token as its union. Knows no files.
"""

from collections.abc import Sequence
from itertools import pairwise

from gpt.errors import require

MOST_IDS = 2**31
MOST_WORK = 10**8  # the sum of the squares of the tokens' lengths: a minute
Pair = tuple[bytes, bytes]


def spell_bytes() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself, or one from U+0100 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    spelled = {byte: chr(byte) for byte in kept}
    return spelled | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


SPELLING = spell_bytes()
BYTES = {character: byte for byte, character in SPELLING.items()}


def spell(token: bytes) -> str:
    """A token as files spell it, a character for each byte."""
    return "".join(SPELLING[byte] for byte in token)


def unspell(text: str) -> bytes:
    """The bytes of a spelled token; KeyError names a character that spells none."""
    return bytes([BYTES[character] for character in text])


def join(text: bytes, ranks: dict[bytes, int], below: int = MOST_IDS, left: int = 1) -> list[bytes]:
    """The parts of `text` after joining neighbours whose union ranks below `below`, lowest first,
    until `left` parts are left or nothing joins."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(parts) > left:
        unions = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        lowest = min(unions)
        if lowest == below:
            break
        i = unions.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def halves(ranks: dict[bytes, int]) -> dict[bytes, list[bytes]]:
    """Each token of several bytes, in order of rank, and what it falls apart into."""
    longer = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    work = sum(len(token) ** 2 for token in longer)
    require(work <= MOST_WORK, "the tokenizer has tokens too long to be looked through")
    return {token: join(token, ranks, ranks[token]) for token in longer}


def splits(token: bytes, ranks: dict[bytes, int]) -> list[Pair]:
    """Every way in which two tokens make up `token`."""
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(a, b) for a, b in cuts if a in ranks and b in ranks]


def clash(pairs: Sequence[Pair], ranks: dict[bytes, int]) -> bool:
    """Whether some text comes to have two unions of `pairs` at once, the earlier in the text by the
    later pair: ranks join that one, the list the other.

    Both are there only when the part has just been made that they share: of `pairs`, that all make
    up one token, every other union is joined as soon as it can be.
    """
    for i, (middle, last) in enumerate(pairs):
        for first, second in pairs[i + 1 :]:
            parts = [first, middle, last]
            # What surrounds them joins nothing inside: alone they go through the same states.
            if second == middle and join(b"".join(parts), ranks, left=3) == parts:
                return True
    return False


def list_merges(ranks: dict[bytes, int]) -> tuple[list[Pair], bool]:
    """The list of pairs that gives the same ids as `ranks`; and whether a whole piece of text that
    is a token must be taken as it is (for the tokens that no joining of lower ones reaches).

    UserError if there is no such list.
    """
    merges: list[Pair] = []
    whole = False
    for token, parts in halves(ranks).items():
        whole |= len(parts) > 2
        merges += [(parts[0], parts[1])] if len(parts) == 2 else splits(token, ranks)
    if whole:
        require_same(merges, ranks, whole)
    return merges, whole


def require_same(merges: Sequence[Pair], ranks: dict[bytes, int], whole: bool) -> None:
    """UserError, with the reason, unless the list of pairs gives the same ids as `ranks`.

    `whole`: a piece of text that is a token is taken as it is, without joining.
    """
    place = {pair: i for i, pair in reversed(list(enumerate(merges)))}
    made = {a + b for a, b in merges}
    last = -1
    for token, parts in halves(ranks).items():
        pairs = [(parts[0], parts[1])] if len(parts) == 2 else splits(token, ranks)
        missing = [pair for pair in pairs if pair not in place]
        name = f"the token {spell(token)!r}"
        require(len(parts) == 2 or whole, f"{name} is made by no pair of the list that fits")
        require(not missing, f"{name} is joined from other halves than its rank asks for")
        pairs.sort(key=place.__getitem__)
        places = [place[pair] for pair in pairs]
        require(
            all(i > last for i in places),
            f"{name} stands elsewhere among the pairs than among the ids",
        )
        last = max([last, *places])
        require(not clash(pairs, ranks), f"{name} is made by pairs of which the wrong one is first")
    strange = made - ranks.keys()
    require(not strange, f"a pair makes {spell(min(strange or [b'']))!r}, which has no id")
