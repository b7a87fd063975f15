"""Distribution of a video's tokens over the ranks of a sequence group; test_sequence.py compares computations."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.distributed.ulysses import Ulysses


class Placed(Ulysses):
    """A rank of a sequence group, without a process group."""

    def __init__(self, size: int, rank: int, tokens: int) -> None:
        self._size, self._rank, self.tokens = size, rank, tokens

    size = property(lambda self: self._size)
    rank = property(lambda self: self._rank)


@given(size=st.integers(1, 9), tokens=st.integers(1, 40), first=st.integers(0, 40))
def test_each_rank_counts_the_real_tokens_of_its_slice(size: int, tokens: int, first: int) -> None:
    """Including slices with some real tokens, with none, and with only padding."""
    first = min(first, tokens)
    is_first = np.arange(tokens) < first
    runs = np.resize(np.append(is_first, np.zeros(-tokens % size, dtype=bool)), (size, -(-tokens // size)))
    for rank, run in enumerate(runs):
        ulysses = Placed(size, rank, tokens)
        assert ulysses.held(first) == run.sum()
        held = ulysses.split(torch.from_numpy(is_first)[None].float(), 1)
        assert torch.equal(held[0], torch.from_numpy(run).float())
        assert torch.equal(held[0, : ulysses.held(first)], torch.ones(ulysses.held(first))), "real tokens come first"
