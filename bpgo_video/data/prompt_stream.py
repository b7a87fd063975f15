"""What is the next batch of prompts? A function of the seed and of how many prompts were consumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.data.images import decode_image, fit_image
from bpgo_video.data.prior_files import PriorTable, attach_priors
from bpgo_video.data.prompt_order import EndlessOrder
from bpgo_video.data.prompt_records import PromptRecord, ShardError
from bpgo_video.types import PromptBatch

Size = tuple[int, int]  # height, width


@runtime_checkable
class RecordSource(Protocol):
    """What a stream reads from: PromptShards."""

    directory: Path

    def rows(self, split: str | None) -> np.ndarray: ...

    def has_images(self, split: str) -> bool: ...

    def record(self, row: int) -> PromptRecord: ...


class PromptStream:
    """An endless iterator of PromptBatch. `position`, the number of prompts consumed, is its whole resume state.

    Each epoch has every prompt of the split once; a batch that reaches an epoch's end goes on into the next. No batch
    holds a prompt twice: see `EndlessOrder`.

    Raises:
        ShardError: no such split, the split is smaller than the batch, or `size` is given and only some of the prompts
            have an image.
    """

    def __init__(
        self,
        shards: RecordSource,
        split: str,
        seed: int,
        batch_size: int,
        start: int = 0,
        priors: Iterable[PriorTable] = (),
        size: Size | None = None,
    ) -> None:
        self._shards, self._priors = shards, tuple(priors)
        self._order = order_of(shards, split, seed, batch_size)
        if start < 0:
            raise ValueError(f"the stream's position is {start}; it must be 0 or more")
        if size is not None:
            shards.has_images(split)  # a mixture ends the run here
        self._batch_size, self._size, self.position = batch_size, size, start

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> PromptBatch:
        records = [self._shards.record(self._order.row(self.position + i)) for i in range(self._batch_size)]
        batch = as_batch(records, self._size)
        if self._priors:
            batch = attach_priors(batch, self._priors)
        self.position += self._batch_size
        return batch


def order_of(shards: RecordSource, split: str, seed: int, batch_size: int) -> EndlessOrder:
    """The endless order of a split's rows.

    Raises:
        ShardError: no such split, or it is smaller than the batch.
    """
    rows = shards.rows(split)
    if not 1 <= batch_size <= len(rows):
        raise ShardError(
            f"a batch of {batch_size} prompts needs a split with as many; {split!r} of {shards.directory} has "
            f"{len(rows)}"
        )
    return EndlessOrder(rows, seed, batch_size)


def as_batch(records: Sequence[PromptRecord], size: Size | None = None) -> PromptBatch:
    """Stack records of one directory into a batch, without priors.

    Args:
        size: height and width of the batch's images, where the records have images; None leaves them out.

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
    )


def _stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([values[name] for values in tensors]) for name in tensors[0]}


def _images(records: Sequence[PromptRecord], size: Size) -> Float[Tensor, "prompts 3 height width"] | None:
    having = [record for record in records if "image" in record.media]
    if not having:
        return None
    if len(having) < len(records):
        raise ShardError(
            f"{len(having)} prompts have an image, {len(records) - len(having)} of the same batch have none"
        )
    return torch.stack(
        [fit_image(decode_image(record.media["image"].data, f"prompt {record.prompt!r}"), *size) for record in having]
    )
