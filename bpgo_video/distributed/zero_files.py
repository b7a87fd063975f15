"""Which files of a checkpoint may be read, and how? Those that name nothing but data; no pickle is run.

[zero_pp_rank_R_]mp_rank_00_model_states.pt        the model's part and the run's own state; ZeRO-3: one for each rank
[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   rank R's part of the optimiser and of the fp32 weights
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

ALLOWED = (ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address)  # what DeepSpeed's own files name
ALLOWED_GLOBALS = {f"{kind.__module__}.{kind.__qualname__}" for kind in ALLOWED}


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, of another layout, or not what it claims to be."""


def refuse_foreign_pickles(folder: Path) -> None:
    """DeepSpeed unpickles its files; look at what they name before it does, without running anything.

    Raises:
        CheckpointError: a file is damaged, or names a global that DeepSpeed's own checkpoints do not have.
    """
    for path in sorted(folder.rglob("*.pt")):
        try:
            foreign = set(get_unsafe_globals_in_checkpoint(path)) - ALLOWED_GLOBALS
        except (RuntimeError, ValueError, OSError) as error:  # what torch raises over a file that it cannot read
            raise CheckpointError(f"{path} is damaged ({error}); copy the checkpoint again") from error
        if foreign:
            raise CheckpointError(f"{path} names {sorted(foreign)}, as no checkpoint of this program does: not loaded")


def read_file(path: Path) -> Any:
    """A file of a checkpoint, its tensors mapped into memory rather than read.

    Raises:
        CheckpointError: see `refuse_foreign_pickles`.
    """
    return _load(path, mmap=True)


def read_without_tensors(path: Path) -> dict[str, Any]:
    """A file of a checkpoint in which tensors are stand-ins without data: `Stored.of` says where theirs lies.

    Raises:
        CheckpointError: see `refuse_foreign_pickles`.
    """
    with FakeTensorMode():
        return _load(path, mmap=False)


def _load(path: Path, mmap: bool) -> Any:
    try:
        with safe_globals(list(ALLOWED)):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except (RuntimeError, ValueError, OSError, UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged, or no file of DeepSpeed's ({error})") from error


@dataclass(frozen=True)
class Stored:
    """A flat tensor of `numel` values that lies in a file from byte `offset` on."""

    path: Path
    offset: int
    numel: int
    dtype: torch.dtype

    @classmethod
    def of(cls, path: Path, tensor: Tensor) -> Stored:
        """Where the data of a tensor of `read_without_tensors(path)` lies."""
        storage: Any = tensor.untyped_storage()
        begin = storage._checkpoint_offset  # set under FakeTensorMode, as torch.load documents
        return cls(path, begin + int(tensor.storage_offset()) * tensor.itemsize, tensor.numel(), tensor.dtype)

    def read_into(self, target: Tensor, start: int) -> None:
        """Fill `target` [n] with the values from `start` on."""
        size = self.dtype.itemsize
        raw = np.fromfile(self.path, np.uint8, len(target) * size, offset=self.offset + start * size)
        target.copy_(torch.from_numpy(raw).view(self.dtype))


def model_file(folder: Path) -> Path:
    """The file with the shapes of all parameters: the only one, or rank 0's.

    Raises:
        CheckpointError: there is none.
    """
    files = sorted(folder.glob("*mp_rank_00_model_states.pt"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise CheckpointError(f"{folder} has no *_model_states.pt; is it a checkpoint, RUN/checkpoints/step-XXXXXX?")
    return files[0]


def complete_optimiser_files(folder: Path) -> list[Path]:
    """A checkpoint's optimiser files in the order of the ranks that wrote them; all of them are there.

    Raises:
        CheckpointError: there is none, or a rank's is missing.
    """
    files = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
    if not files:
        raise CheckpointError(f"{folder} has no *_optim_states.pt, where ZeRO keeps the weights; is the copy complete?")
    counts = read_file(files[0])["optimizer_state_dict"]["partition_count"]  # ZeRO 1 and 2: one for each group
    expected = max(counts) if isinstance(counts, list) else counts
    if [_rank(path) for path in files] != list(range(expected)):
        raise CheckpointError(
            f"{folder} was written by {expected} ranks and holds *_optim_states.pt of ranks "
            f"{[_rank(path) for path in files]}; is the copy complete?"
        )
    return files


def _rank(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    assert found is not None, f"{path} was found by its rank"
    return int(found[1])
