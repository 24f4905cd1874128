"""ROUGE-L between short texts, exact and fast: how Self-Instruct keeps a new instruction from repeating an old one.

    L = length of the longest common subsequence of words,   P = L / |b|,   R = L / |a|,   F = 2 P R / (P + R)

Words are those of Google's rouge_score without stemmer: lower case, runs of [a-z0-9]. Self-Instruct (Wang et al. 2022,
arXiv:2212.10560) drops a text whose largest F against the pool is above 0.7: 1.25e9 comparisons for 50,000 texts. They
are made with bits: one bit a word of one text, a few integer operations a word of the other (Crochemore et al. 2001,
Hyyro 2004), for all texts of the pool at once. tests/test_rouge_speed.py measures it.

F is computed in rouge_score's own order, to the last bit. An F of exactly 0.7 passes, but where that order rounds up
(7 common words of 7 and 13 give 0.7000000000000001) it does not: so it was when the published data were made.
"""
from __future__ import annotations

import re
from array import array

import numpy as np

ONES_IN_BYTE = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


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


def rouge_l(target: str, prediction: str) -> float:
    a, b = words(target), words(prediction)
    return f_measure(lcs(places(a), len(a), b), len(a), len(b))


class Pool:
    """Texts to compare with, indexed by word."""

    def __init__(self, texts: list[str] = ()):
        self.texts: list[str] = []
        self.lengths = array("i")
        # By word: the texts that hold it, and its places there; not of texts of more than 64 words, which do not fit.
        self.index: dict[str, tuple[array, array]] = {}
        self.long: list[int] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        said, number = words(text), len(self.texts)
        self.texts.append(text)
        self.lengths.append(len(said))
        if len(said) > 64:
            self.long.append(number)
            return
        for word, bits in places(said).items():
            texts, masks = self.index.setdefault(word, (array("i"), array("Q")))
            texts.append(number)
            masks.append(bits)

    def similarities(self, text: str) -> np.ndarray:
        """F with every text [n]: `lcs` of all of them at once, and f_measure."""
        said = words(text)
        rows = np.full(len(self.texts), np.iinfo(np.uint64).max, dtype=np.uint64)
        for word in said:
            if word in self.index:  # only the rows of texts that hold the word change
                texts = np.frombuffer(self.index[word][0], np.int32)
                masks = np.frombuffer(self.index[word][1], np.uint64)
                row = rows[texts]
                found = row & masks
                rows[texts] = (row + found) | (row - found)
        common = ONES_IN_BYTE[(~rows).view(np.uint8)].reshape(-1, 8).sum(axis=1, dtype=np.int64)
        bits = places(said)
        for i in self.long:
            common[i] = lcs(bits, len(said), words(self.texts[i]))
        # A text without words has nothing in common: its length, 0, does not matter.
        precision, recall = common / np.maximum(1, np.frombuffer(self.lengths, np.int32)), common / max(1, len(said))
        return np.divide(2 * precision * recall, precision + recall, out=np.zeros(len(common)), where=common > 0)


def filter_similar(texts: list[str], threshold: float = 0.7) -> list[tuple[int, float] | None]:
    """For each text in order: None if it is kept, else the most similar text kept before it, and their F."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a number above 0, at most 1")
    pool, kept, verdicts = Pool(), [], []
    for number, text in enumerate(texts):
        f = pool.similarities(text)
        if kept and f.max() > threshold:
            verdicts.append((kept[f.argmax()], float(f.max())))
            continue
        verdicts.append(None)
        pool.add(text)
        kept.append(number)
    return verdicts
