"""Which prompts are nearly the same? Those that share most of their words, found without comparing all pairs.

MinHash (Broder 1997): the smallest hash over a set's words is equal for two sets with probability J, their Jaccard
similarity |A & B| / |A | B|. Of BANDS x ROWS such hashes, two prompts are compared when all ROWS of some band agree: at
J = 0.8 with probability 1 - (1 - J^4)^16 = 0.9998. Compared prompts are judged by their true J. Where many agree in a
band, each is compared with the LOOK_BACK before it: time stays linear, and a rare pair may be missed.

Of each prompt 4 bytes a word and 144 bytes stay in memory.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

THRESHOLD = 0.8
BANDS, ROWS, LOOK_BACK = 16, 4, 4
_WORDS = np.random.Philox(key=np.array([0, 0], dtype=np.uint64)).random_raw(2 * BANDS * ROWS)
FACTORS, OFFSETS = _WORDS[: BANDS * ROWS] | np.uint64(1), _WORDS[BANDS * ROWS :]
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], dtype=np.uint64)


class NearDuplicates:
    """Collects texts; their number is the order in which they were added."""

    def __init__(self) -> None:
        self._words, self._stops, self._bands = array("I"), array("q", [0]), array("Q")

    def add(self, text: str) -> None:
        words = words_of(text)
        self._words.extend(words)
        self._stops.append(len(self._words))
        self._bands.extend(_bands(words))

    def groups(self) -> list[list[int]]:
        """Texts that are near each other, directly or through others of the group; ascending, two or more."""
        parents = list(range(len(self._stops) - 1))
        for one, two in self._candidates():
            first, second = _root(parents, one), _root(parents, two)
            if first != second and self._similarity(one, two) >= THRESHOLD:
                parents[max(first, second)] = min(first, second)
        members: dict[int, list[int]] = {}
        for row, parent in enumerate(parents):
            if parent != row:
                root = _root(parents, row)
                members.setdefault(root, [root]).append(row)
        return sorted(members.values())

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """Each text with those just before it among the ones of equal band, for every band."""
        bands = np.frombuffer(self._bands, dtype=np.uint64).reshape(-1, BANDS)
        for band in bands.T:
            order = np.argsort(band, kind="stable")
            for lag in range(1, LOOK_BACK + 1):
                same = np.flatnonzero(band[order[lag:]] == band[order[:-lag]])
                yield from zip(order[same].tolist(), order[same + lag].tolist(), strict=True)

    def _similarity(self, one: int, two: int) -> float:
        first, second = (set(self._words[self._stops[row] : self._stops[row + 1]]) for row in (one, two))
        return len(first & second) / len(first | second)


def words_of(text: str) -> list[int]:
    """Hashes of the distinct words of a text, without case and punctuation; of a text without words, of the text."""
    return sorted({_hash(word) for word in re.findall(r"\w+", text.casefold()) or [text]})


@lru_cache(maxsize=2**16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")


def _bands(words: list[int]) -> list[int]:
    hashes = np.array(words, dtype=np.uint64)[:, None] * FACTORS + OFFSETS  # modulo 2^64
    smallest = (hashes >> np.uint64(32)).min(axis=0).reshape(BANDS, ROWS)
    return (smallest * MIX).sum(axis=1, dtype=np.uint64).tolist()


def _root(parents: list[int], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row
