"""What can be made of ZeRO's checkpoint files without their ranks? Whole weights, and files for any number of ranks.

All of it unpickles: `checkpoint.refuse_foreign_pickles` looks at the files first.
"""

from __future__ import annotations

import io
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor


def full_state_dict(folder: Path) -> dict[str, Tensor]:
    """The trained parameters in a checkpoint that `Engine.save` wrote under ZeRO of any stage on any number of ranks.

    Whole, fp32 (the optimiser's own), on the CPU and without a process group; frozen parameters are left out.
    """
    with redirect_stdout(io.StringIO()):  # DeepSpeed tells what it does in prints
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name, exclude_frozen_parameters=True)


def saved_state(folder: Path) -> dict[str, Any]:
    """What was saved beside the tensors: the run's own state and the schedule's; tensors stay on the disk."""
    first = min(folder.glob("*_model_states.pt"))
    return torch.load(first, map_location="cpu", mmap=True, weights_only=False)


def write_universal(folder: Path, output: Path) -> None:
    """DeepSpeed's universal checkpoint: a file per parameter and kind of optimiser state.

    In this process alone: a fork of one that computes on a GPU would not be safe.
    """
    arguments = Namespace(
        input_folder=str(folder),
        output_folder=str(output),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # prints and progress bars
        ds_to_universal.main(arguments)
