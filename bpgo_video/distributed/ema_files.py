"""How does an average outlive its run? As shards of kind `ema` in each checkpoint, readable on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from bpgo_video.distributed.ema import EMA
from bpgo_video.distributed.shard_files import SavedShards, save_shards
from bpgo_video.distributed.zero_files import CheckpointError

KIND = "ema"


def save_average(ema: EMA, folder: Path, rank: int) -> None:
    """Write this rank's shards of the average into a checkpoint's folder."""
    save_shards(ema.shards, folder, KIND, rank, updates=str(ema.updates))


def load_average(ema: EMA, folder: Path) -> None:
    """Continue the average in a checkpoint of any number of ranks and any stage.

    Raises:
        CheckpointError: it holds none, or one of another model.
    """
    with _saved_average(folder) as saved:
        for shard in ema.shards:
            shard.values.copy_(saved.elements(shard))
        ema.updates = int(saved.notes["updates"])


class AverageParameters(Mapping[str, Tensor]):
    """The average in a checkpoint, fp32 by parameter name, each whole and read when it is asked for.

    What `ZeroParameters` are to the raw weights.

    Raises:
        CheckpointError: the run kept none, or files are missing.
    """

    def __init__(self, folder: Path):
        self._files = ExitStack()
        self._saved = self._files.enter_context(_saved_average(folder))

    def __getitem__(self, name: str) -> Tensor:
        return self._saved.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved.shapes)

    def __len__(self) -> int:
        return len(self._saved.shapes)


@contextmanager
def _saved_average(folder: Path) -> Iterator[SavedShards]:
    try:
        with SavedShards(folder, KIND) as saved:
            yield saved
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error}: its run kept no average of the weights; take the raw ones, or train with ema.decay above 0"
        ) from None
