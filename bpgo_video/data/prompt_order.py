"""In which order are prompts read? A shuffle that depends on the seed and the epoch alone."""

from __future__ import annotations

import numpy as np

LARGEST_WINDOW = 4096


def window(size: int) -> int:
    """How many consecutive prompts of the endless order are sure to differ: half the split, at most 4096."""
    return min(size // 2, LARGEST_WINDOW)


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `size` prompts in an epoch: a permutation, [size] int64.

    With P_e a uniform permutation keyed by (seed, e) and w = window(size), it is P_e with its first w places
    rearranged: prompts that are not among the last w of P_(e-1) first, the others after them in their order there. Any
    w consecutive prompts are then distinct, also across the end of an epoch: if m of the first w prompts are among the
    last w before, the k-th of them now stands at w - m + k, and stood at size - m + k or earlier. The last w places are
    P_e's own, so no epoch depends on more than the one before it.
    """
    order, w = _permutation(size, seed, epoch), window(size)
    if epoch == 0 or w == 0:
        return order
    place = np.full(size, -1)
    place[_permutation(size, seed, epoch - 1)[size - w :]] = np.arange(w)
    head = order[:w]
    order[:w] = head[np.argsort(place[head], kind="stable")]
    return order


class EndlessOrder:
    """Epoch after epoch of some rows: each once an epoch, and no batch with a row twice.

    `window` sees to the latter for batches of up to half the rows (at most 4096); larger ones read epoch 0's order
    again and again, in which any two appearances of a row are all rows apart.

    Args:
        batch_size: rows that are read together; at most all.
    """

    def __init__(self, rows: np.ndarray, seed: int, batch_size: int) -> None:
        self._rows, self._seed, self._reshuffles = rows, seed, batch_size <= window(len(rows))
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def row(self, position: int) -> int:
        """The row at a place of the endless order, counted from 0."""
        epoch, place = divmod(position, len(self._rows))
        if not self._reshuffles:
            epoch = 0
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self._rows), self._seed, epoch)
        return int(self._rows[self._order[place]])


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Sorts raw Philox words: numpy promises the same ones in every version, which it does not for `permutation`."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable")
