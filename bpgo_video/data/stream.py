"""The endless stream of prompt batches: a function of the seed and of the number of prompts consumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.data.media import Size, decode_image, fit_image
from bpgo_video.data.priors import PriorTable
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import PromptRecord, ShardError
from bpgo_video.types import PromptBatch

LARGEST_WINDOW = 4096


class PromptStream:
    """An endless iterator of PromptBatch. `position`, the number of prompts consumed, is its whole resume state.

    Each epoch has every prompt of the split once, and batches cross the ends of epochs. No batch holds a prompt twice.

    Args:
        start: the first batch begins after this many prompts.
        priors: anchors to attach to the batches.
        size: see `as_batch`.

    Raises:
        ShardError: no such split, the split is smaller than the batch, or `size` is given and only some of the prompts
            have an image.
    """

    def __init__(
        self,
        shards: PromptShards,
        split: str,
        seed: int,
        batch_size: int,
        start: int = 0,
        priors: Iterable[PriorTable] = (),
        size: Size | None = None,
    ) -> None:
        if start < 0:
            raise ValueError(f"the stream's position is {start}; it must be 0 or more")
        self._order = EndlessOrder(shards, split, seed, batch_size)
        if size is not None:
            shards.has_images(split)  # raises if only some prompts have one
        self._shards, self._batch_size, self._priors, self._size = shards, batch_size, tuple(priors), size
        self.position = start

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> PromptBatch:
        positions = range(self.position, self.position + self._batch_size)
        batch = as_batch([self._shards.record(self._order.row(position)) for position in positions], self._size)
        self.position = positions.stop
        return replace(batch, priors={table.reward: table.anchor(batch) for table in self._priors})


class EndlessOrder:
    """Epoch after epoch of a split's rows: each row once per epoch, and no batch with a row twice.

    `window` guarantees the latter for batches of up to half the rows (at most 4096). Larger batches repeat the order of
    epoch 0, in which two appearances of a row are len(rows) positions apart.

    Raises:
        ShardError: no such split, or it is smaller than the batch.
    """

    def __init__(self, shards: PromptShards, split: str, seed: int, batch_size: int) -> None:
        rows = shards.rows(split)
        if not 1 <= batch_size <= len(rows):
            raise ShardError(
                f"a batch of {batch_size} prompts needs a split with as many or more; {split!r} of {shards.directory} "
                f"has {len(rows)}"
            )
        self._rows, self._seed, self._reshuffles = rows, seed, batch_size <= window(len(rows))
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def row(self, position: int) -> int:
        """The row at a position of the endless order, counted from 0."""
        epoch, place = divmod(position, len(self._rows))
        epoch = epoch if self._reshuffles else 0
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self._rows), self._seed, epoch)
        return int(self._rows[self._order[place]])

    def rows(self, positions: range) -> list[int]:
        """The rows at these positions, each once, in the order of their first visit."""
        enough = positions[: 2 * len(self._rows)]  # they contain a whole epoch
        return list(dict.fromkeys(self.row(position) for position in enough))


def window(size: int) -> int:
    """How many consecutive prompts of the endless order are certainly distinct: half the split, at most 4096."""
    return min(size // 2, LARGEST_WINDOW)


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `size` prompts in an epoch: a permutation, [size] int64.

    With P_e a uniform permutation keyed by (seed, e) and w = window(size), the order is P_e with its first w positions
    rearranged: first the prompts that are not among the last w of P_(e-1), then the others in their order there. Any w
    consecutive prompts are then distinct, also across the end of an epoch: if m of the first w prompts are among the
    last w of the epoch before, the k-th of them moves to position w - m + k, and was at size - m + k or earlier. The
    last w positions are P_e's own, so an epoch depends on no more than the one before it.
    """
    order, w = _permutation(size, seed, epoch), window(size)
    if epoch == 0 or w == 0:
        return order
    place = np.full(size, -1)
    place[_permutation(size, seed, epoch - 1)[size - w :]] = np.arange(w)
    head = order[:w]
    order[:w] = head[np.argsort(place[head], kind="stable")]
    return order


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Sorts raw Philox words: numpy guarantees them in every version, unlike the results of `permutation`."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable")


def as_batch(records: Sequence[PromptRecord], size: Size | None = None) -> PromptBatch:
    """Stack records of one folder into a batch without priors.

    Args:
        size: height and width of the batch's images, if the records have images; None leaves images out.

    Raises:
        ShardError: `size` is given, and only some of the records have an image.
        ImageError: an image does not decode.
    """
    negatives = {record.negative_prompt: record.negative for record in records}  # None: the folder's
    number = {text: row for row, text in enumerate(negatives)}
    return PromptBatch(
        ids=torch.tensor([record.id for record in records], dtype=torch.int64),
        texts=tuple(record.prompt for record in records),
        conditioning=_stacked([record.conditioning for record in records]),
        negative=_stacked(list(negatives.values())),
        negative_rows=torch.tensor([number[record.negative_prompt] for record in records]),
        images=None if size is None else _images(records, size),
        videos=_videos(records),
        tags=tuple(record.tags for record in records),
    )


def _stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([values[name] for values in tensors]) for name in tensors[0]}


def _images(records: Sequence[PromptRecord], size: Size) -> Float[Tensor, "prompts 3 height width"] | None:
    files = [(record.media["image"], f"prompt {record.prompt!r}") for record in records if "image" in record.media]
    if 0 < len(files) < len(records):
        raise ShardError(f"{len(files)} prompts have an image, {len(records) - len(files)} of the same batch have none")
    images = [fit_image(decode_image(file.data, owner), *size) for file, owner in files]
    return torch.stack(images) if images else None


def _videos(records: Sequence[PromptRecord]) -> tuple[bytes, ...] | None:
    """The prompts' video files; None unless all have one, which runs that need them check by the split."""
    files = tuple(record.media["video"].data for record in records if "video" in record.media)
    return files if len(files) == len(records) else None
