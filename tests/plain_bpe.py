"""Byte-pair encoding in the plainest way, to compare with: learning merges and applying them."""

from itertools import pairwise

import regex

from gpt.convert import pieces


def learn(text, n, pattern=pieces.GPT2):
    """`n` merges of the pairs that are most frequent: Sennrich et al. 2016, in the plainest way."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(pattern, text)]
    merges = []
    for _ in range(n):
        counts = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [join(word, best) for word in words]
    return merges


def join(word, pair):
    out, i = [], 0
    while i < len(word):
        pairs = tuple(word[i : i + 2]) == pair
        out.append(word[i] + word[i + 1] if pairs else word[i])
        i += 1 + pairs
    return out


def plainly(text, merges, ids, pattern=pieces.GPT2):
    """Ids of a text by the definition: in each piece the first pair of the list that occurs."""
    found = []
    for piece in regex.findall(pattern, text):
        word = [bytes([b]) for b in piece.encode()]
        for pair in merges:
            word = join(word, pair)
        found += [ids[token] for token in word]
    return found


def by_list(piece, merges, ids):
    """Ids of one piece by the first pair of the list that occurs, each time anew."""
    word, found = [bytes([b]) for b in piece.encode()], True
    while found:
        found = next((pair for pair in merges if pair in pairwise(word)), None)
        word = join(word, found) if found else word
    return [ids[token] for token in word]
