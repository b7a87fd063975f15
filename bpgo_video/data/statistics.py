"""Statistics of a folder of prompts: lengths, tags, repeated and nearly equal prompts, and leaks between splits.

Nearly equal prompts share most of their words. MinHash (Broder 1997) finds them without comparing all pairs: the
smallest hash over a set's words is equal for two sets A, B with probability J = |A & B| / |A | B|, their Jaccard
similarity. With BANDS x ROWS such hashes, two prompts are compared if all ROWS of some band agree, which has the
probability 1 - (1 - J^4)^16 = 0.9998 at J = 0.8. Compared prompts are judged by their exact J. If many prompts agree in
a band, each is compared with the LOOK_BACK before it: time stays linear, and a rare pair may be missed.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bpgo_video.data.records import prompt_id

THRESHOLD = 0.8
BANDS, ROWS, LOOK_BACK = 16, 4, 4
_WORDS = np.random.Philox(key=np.array([0, 0], dtype=np.uint64)).random_raw(2 * BANDS * ROWS)
FACTORS, OFFSETS = _WORDS[: BANDS * ROWS] | np.uint64(1), _WORDS[BANDS * ROWS :]
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], dtype=np.uint64)


@dataclass(frozen=True)
class Statistics:
    """The result of `prompt_statistics`.

    Attributes:
        characters: of the shortest, the median and the longest prompt.
        tags: prompts with each tag.
        media: prompts with an image, with a video.
        negatives: prompts with their own negative prompt, and the number of different ones.
        repeated: prompts with the text of an earlier one.
        near: groups of rows whose texts are nearly or exactly equal.
        leaks: the groups that span several splits.
        equal_leaks: texts that occur in several splits.
    """

    characters: tuple[int, int, int]
    tags: Mapping[str, int]
    media: Mapping[str, int]
    negatives: tuple[int, int]
    repeated: int
    near: Sequence[Sequence[int]]
    leaks: Sequence[Sequence[int]]
    equal_leaks: int


def prompt_statistics(headers: Iterable[Mapping[str, Any]]) -> Statistics:
    """Read the headers of all records once, in the order of their rows. Keeps 4 bytes per word and 168 per prompt."""
    tags: Counter[str] = Counter()
    media: Counter[str] = Counter()
    codes: dict[str, int] = {}
    lengths, texts, splits, negatives = (array("q") for _ in range(4))
    near = NearDuplicates()
    for header in headers:
        tags.update(header["tags"])
        media.update(kind for kind in ("image", "video") if f"{kind}_sha256" in header)
        lengths.append(len(header["prompt"]))
        texts.append(prompt_id(header["prompt"]))
        splits.append(codes.setdefault(header["split"], len(codes)))
        if "negative_prompt" in header:
            negatives.append(prompt_id(header["negative_prompt"]))
        near.add(header["prompt"])
    ordered = np.sort(lengths).tolist()
    groups = near.groups()
    text_splits = np.unique(np.stack([texts, splits], axis=1), axis=0)
    distinct, splits_of_text = np.unique(text_splits[:, 0], return_counts=True)
    return Statistics(
        characters=(ordered[0], ordered[len(ordered) // 2], ordered[-1]),
        tags=tags,
        media=media,
        negatives=(len(negatives), len(set(negatives))),
        repeated=len(texts) - len(distinct),
        near=groups,
        leaks=[group for group in groups if len({splits[row] for row in group}) > 1],
        equal_leaks=int((splits_of_text > 1).sum()),
    )


class NearDuplicates:
    """Collects texts and groups those that are nearly equal. A text's row is the order in which it was added."""

    def __init__(self) -> None:
        self._words, self._ends, self._bands = array("I"), array("q", [0]), array("Q")

    def add(self, text: str) -> None:
        words = words_of(text)
        self._words.extend(words)
        self._ends.append(len(self._words))
        hashes = np.array(words, dtype=np.uint64)[:, None] * FACTORS + OFFSETS  # modulo 2^64
        smallest = (hashes >> np.uint64(32)).min(axis=0).reshape(BANDS, ROWS)
        self._bands.extend((smallest * MIX).sum(axis=1, dtype=np.uint64).tolist())

    def groups(self) -> list[list[int]]:
        """Groups of two or more rows, ascending, that are near each other directly or through others of the group."""
        candidates = [np.empty((0, 2), dtype=np.int64)]
        for band in np.frombuffer(self._bands, dtype=np.uint64).reshape(-1, BANDS).T:
            order = np.argsort(band, kind="stable")
            for lag in range(1, LOOK_BACK + 1):
                equal = np.flatnonzero(band[order[lag:]] == band[order[:-lag]])
                candidates.append(np.stack([order[equal], order[equal + lag]], axis=1))
        pairs = np.unique(np.concatenate(candidates), axis=0)
        near = pairs[np.array([self._similarity(*pair) >= THRESHOLD for pair in pairs.tolist()], dtype=bool)]
        count = len(self._ends) - 1
        graph = coo_array((np.ones(len(near)), (near[:, 0], near[:, 1])), shape=(count, count))
        _, labels = connected_components(graph, directed=False)
        members: dict[int, list[int]] = {}
        for row, label in enumerate(labels.tolist()):
            members.setdefault(label, []).append(row)
        return [rows for rows in members.values() if len(rows) > 1]

    def _similarity(self, one: int, two: int) -> float:
        first, second = (set(self._words[self._ends[row] : self._ends[row + 1]]) for row in (one, two))
        return len(first & second) / len(first | second)


def held_out(texts: np.ndarray, groups: Sequence[Sequence[int]], share: float) -> frozenset[int]:
    """The texts to hold out, by their keys: about `share` of them, whatever their order.

    A text is held out if a hash of it is below the share, so other texts do not matter, except those that are nearly
    equal: a group of these stays together, by the hash of the text with the smallest key. Larger groups than the share
    are trained on. Of two or more texts, at least one is held out and at least one is not.

    Args:
        texts: `prompt_id` of each prompt's text, [prompts] int64.
        groups: rows of nearly equal texts. If all texts are one group, only equal texts stay together.
        share: 0 to 1.
    """
    _, units = np.unique(texts, return_inverse=True)
    if [len(group) for group in groups] != [len(texts)]:
        for group in groups:
            units[list(group)] = units[group[0]]
    _, units, sizes = np.unique(units, return_inverse=True, return_counts=True)
    keys = np.full(len(sizes), np.iinfo(np.int64).max)
    np.minimum.at(keys, units, texts)
    draws = (keys.astype(np.uint64) * MIX[0]) / 2.0**64  # the smallest of several keys is small: mix its bits
    chosen = (draws < share) & (sizes <= max(1, share * len(texts)))
    if not chosen.any():
        chosen[np.lexsort((draws, sizes))[0]] = True
    if chosen.all():
        chosen[draws.argmax()] = False
    return frozenset(texts[chosen[units]].tolist())


def words_of(text: str) -> list[int]:
    """Hashes of the distinct words of a text, without case and punctuation. A text without words is one word."""
    return sorted({_hash(word) for word in re.findall(r"\w+", text.casefold()) or [text]})


@lru_cache(maxsize=2**16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")
