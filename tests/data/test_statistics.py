"""Prompt statistics: exact and near duplicates, and leaks between splits, compared with a brute-force search."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.data.records import prompt_id
from bpgo_video.data.statistics import THRESHOLD, NearDuplicates, held_out, prompt_statistics, words_of

VOCABULARY = [f"word{i}" for i in range(60)]


def groups(texts: list[str]) -> list[list[int]]:
    near = NearDuplicates()
    for text in texts:
        near.add(text)
    return near.groups()


def all_pairs(texts: list[str]) -> list[list[int]]:
    """Connected components of "Jaccard similarity of the word sets is at least THRESHOLD", by comparing all pairs."""
    sets = [set(text.split()) for text in texts]
    component = list(range(len(texts)))
    for j in range(len(texts)):
        for i in range(j):
            if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= THRESHOLD:
                old, new = component[j], component[i]
                component = [new if c == old else c for c in component]
    found = [[i for i, c in enumerate(component) if c == name] for name in dict.fromkeys(component)]
    return [group for group in found if len(group) > 1]


def test_groups_equal_those_of_a_comparison_of_all_pairs() -> None:
    draw = random.Random(0)
    texts = []
    for _ in range(150):
        words = draw.sample(VOCABULARY, 12)
        for _ in range(draw.randrange(4)):
            changed = words.copy()
            changed[draw.randrange(12)] = draw.choice(VOCABULARY)
            texts.append(" ".join(changed))
        texts.append(" ".join(words))
    draw.shuffle(texts)
    assert sorted(groups(texts)) == sorted(all_pairs(texts))


@given(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=20))
def test_case_order_and_punctuation_make_no_difference(words: list[str]) -> None:
    other = ", ".join(reversed(words)).upper() + "!"
    assert groups([" ".join(words), other]) == [[0, 1]]


def test_texts_without_words_are_compared_exactly() -> None:
    assert groups(["!?", "...", "!?"]) == [[0, 2]]
    assert words_of("") != words_of("!")


def header(prompt: str, split: str, **fields) -> dict:
    return {"prompt": prompt, "split": split, "tags": [], **fields}


def test_leaks_are_the_groups_that_span_splits() -> None:
    long = " ".join(VOCABULARY[:20])
    found = prompt_statistics(
        iter(
            [
                header("equal", "train", tags=["a"]),
                header(long, "train", image_sha256="0"),
                header("of train only", "train"),
                header("of train only", "train", tags=["a", "b"]),
                header("equal", "heldout"),
                header(long.replace("word7", "other"), "heldout", image_sha256="1", video_sha256="2"),
            ]
        )
    )
    assert found.near == [[0, 4], [1, 5], [2, 3]]
    assert found.leaks == [[0, 4], [1, 5]]
    assert (found.equal_leaks, found.repeated) == (1, 2)
    assert found.tags == {"a": 2, "b": 1}
    assert found.media == {"image": 2, "video": 1}
    assert found.characters == (5, 13, len(long))


def chosen(texts: list[str], share: float = 0.1) -> set[str]:
    keys = np.array([prompt_id(text) for text in texts])
    found = held_out(keys, groups(texts), share)
    return {text for text in texts if prompt_id(text) in found}


def test_a_text_is_held_out_whatever_the_others_are_and_their_order() -> None:
    texts = [f"{'abcdefgh'[i % 8]} {'xyz'[i % 3]} number {i}" for i in range(2000)]
    whole = chosen(texts)
    assert 150 < len(whole) < 250
    assert chosen(texts[::-1]) == whole
    assert chosen(texts[::2]) == whole & set(texts[::2])
    assert whole < chosen(texts, 0.3)


@given(st.lists(st.sampled_from(VOCABULARY), min_size=2, max_size=30), st.sampled_from([0.01, 0.1, 0.5, 0.99]))
def test_of_two_or_more_texts_one_is_held_out_and_one_is_not(texts: list[str], share: float) -> None:
    assert len(chosen(texts, share)) in (range(1, len(set(texts))) if len(set(texts)) > 1 else range(1))


def test_nearly_equal_texts_stay_together_unless_all_are() -> None:
    draw = random.Random(1)
    families = []
    for _ in range(300):
        words = draw.sample(VOCABULARY, 12)
        families.append([" ".join(words), " ".join(words[:11]), " ".join(words).upper() + "!"])
    whole = chosen([text for family in families for text in family])
    taken = [sum(text in whole for text in family) for family in families]
    assert set(taken) == {0, 3}
    assert 15 < taken.count(3) < 50
    assert len(chosen(families[0], 0.1)) == 1
