"""What is in a folder of prompts? Lengths, tags, repeated prompts, and prompts of one split that leak into another."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bpgo_video.data.near_duplicates import NearDuplicates
from bpgo_video.data.prompt_files import prompt_id


@dataclass(frozen=True)
class Statistics:
    """What `prompt_statistics` counted.

    Attributes:
        characters: shortest, median and longest prompt.
        tags: prompts of each tag.
        media: prompts with an image, with a video.
        negatives: prompts with a negative prompt of their own, and how many different ones those are.
        repeated: prompts whose text an earlier one has.
        near: groups of rows whose texts are nearly the same, or the same.
        leaks: those of them that are in more than one split.
        equal_leaks: texts that are in more than one split as they are.
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
    """Read the headers of all records once, in the order of their rows; see near_duplicates.py for the memory."""
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
    ordered = sorted(lengths)
    groups = near.groups()
    distinct = np.unique(texts)
    of_split = np.unique(np.stack([texts, splits], axis=1), axis=0)
    return Statistics(
        characters=(ordered[0], ordered[len(ordered) // 2], ordered[-1]),
        tags=tags,
        media=media,
        negatives=(len(negatives), len(np.unique(negatives))),
        repeated=len(texts) - len(distinct),
        near=groups,
        leaks=[group for group in groups if len({splits[row] for row in group}) > 1],
        equal_leaks=int((np.unique(of_split[:, 0], return_counts=True)[1] > 1).sum()),
    )
