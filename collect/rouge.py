"""ROUGE-L between short texts, exact and fast: how Self-Instruct keeps a new instruction from repeating an old one.

    L = length of the longest common subsequence of words,  P = L / |b|,  R = L / |a|,
    F = 2 P R / (P + R) = 2 L / (|a| + |b|)

Words are those of Google's rouge_score without stemmer: lower case, runs of [a-z0-9]. Self-Instruct (Wang et al. 2022,
arXiv:2212.10560) drops a text whose largest F against the pool is above 0.7: 1.25e9 comparisons for 50,000 texts.
Nearly all are decided without a subsequence. F > t needs L > t (|a| + |b|) / 2, and L is at most

    min(|a|, |b|)                          lengths that differ too much are out
    sum over words of min(count, count)    so are texts that share too few words, in whatever order

and a text that shares none of another's rarest words cannot share enough of the others. The few that are left are
compared with bits: one bit a word of one text, a few integer operations a word of the other (Crochemore et al. 2001,
Hyyro 2004). tests/test_rouge_speed.py measures it.

F is computed in rouge_score's own order, to the last bit. An F of exactly 0.7 passes, but where that order rounds up
(7 common words of 7 and 13 give 0.7000000000000001) it does not: so it was when the published data were made.
"""
import re
from array import array
from collections import Counter

import numpy as np

TOLERANCE = 1e-9  # bounds rule out only what is clearly below the threshold: F itself decides


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def places(said: list[str]) -> dict[str, int]:
    """Where each word stands, as the bits of an integer."""
    bits: dict[str, int] = {}
    for i, word in enumerate(said):
        bits[word] = bits.get(word, 0) | 1 << i
    return bits


def lcs(a: dict[str, int], length: int, b: list[str]) -> int:
    """Length of the longest common subsequence of a text, given by its `places` and its length, and another.

    `row` is a row of the usual table: bit i is 0 where it steps up at word i. Each word of b moves some steps left.
    """
    row = (1 << length) - 1
    for word in b:
        if found := row & a.get(word, 0):
            row = (row + found) | (row - found)
    return length - (row & (1 << length) - 1).bit_count()  # bits beyond the length hold carries


def f_measure(common: int, a: int, b: int) -> float:
    """F of texts of a and b words with a common subsequence of `common`."""
    if not common:
        return 0.0
    precision, recall = common / b, common / a
    return 2 * precision * recall / (precision + recall)


class Pool:
    """Texts to compare with, indexed by word."""

    def __init__(self, texts: list[str] = (), threshold: float = 0.7):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected a number above 0, at most 1")
        self.threshold = threshold
        self.texts: list[str] = []
        self.words: list[list[str]] = []
        self.lengths = array("i")
        self.index: dict[str, tuple[array, array]] = {}  # by word: the texts that hold it, and how often
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        said = words(text)
        for word, count in Counter(said).items():
            texts, counts = self.index.setdefault(word, (array("i"), array("i")))
            texts.append(len(self.words))
            counts.append(count)
        self.texts.append(text)
        self.words.append(said)
        self.lengths.append(len(said))

    def too_similar(self, text: str) -> tuple[int, float] | None:
        """Which text of the pool has the largest F, and that F, if it is above the threshold; of equals the first."""
        said = words(text)
        best, nearest, bits = self.threshold, None, places(said)
        for i in self._likely(said):
            f = f_measure(lcs(bits, len(said), self.words[i]), len(said), len(self.words[i]))
            if f > best:
                best, nearest = f, (i, f)
        return nearest

    def _likely(self, said: list[str]) -> list[int]:
        """The texts that the two bounds do not rule out, in order."""
        counts = Counter(said)
        lengths = np.frombuffer(self.lengths, dtype=np.int32)
        # L > t (|a| + |b|) / 2 and |b| >= L: whatever |b| is, L > t |a| / (2 - t).
        least = self.threshold * len(said) / (2 - self.threshold) - TOLERANCE
        shared = np.zeros(len(lengths), dtype=np.int32)  # words in common, of those looked at
        known = [word for word in counts if word in self.index]
        unseen = sum(counts[word] for word in known)
        for word in sorted(known, key=lambda word: len(self.index[word][0])):  # the rarest first
            if unseen < least:
                break  # a text without any of the words so far is out
            unseen -= counts[word]
            texts, held = self.index[word]
            shared[texts] += np.minimum(held, counts[word])
        some = np.flatnonzero(shared)
        needed = self.threshold * (len(said) + lengths) / 2 - TOLERANCE
        some = some[np.minimum(shared[some] + unseen, lengths[some]) >= needed[some]].tolist()
        return [i for i in some if (Counter(self.words[i]) & counts).total() >= needed[i]]
