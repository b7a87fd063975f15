"""How does a checkpoint leave the number of ranks that wrote it? As DeepSpeed's universal checkpoint, one file a state.

    OUTPUT/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt   each parameter whole, with its optimiser's state
    OUTPUT/zero/optimizer_state.pt                       what all parameters share
    OUTPUT/*_model_states.pt                             as in the checkpoint: the run's own state is in it

DeepSpeed reads it under `{"checkpoint": {"load_universal": true}}` on any number of ranks: what ZeRO 1 or 2 wrote under
1 and 2, what ZeRO 3 wrote under 3.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor
from tqdm import tqdm

from bpgo_video.atomic import new_folder
from bpgo_video.distributed.zero_files import (
    CheckpointError,
    complete_optimiser_files,
    read_file,
    refuse_foreign_pickles,
)


def to_universal(checkpoint_folder: Path, output_folder: Path) -> Path:
    """Write the universal form of a checkpoint, aside and then renamed; the folder `output_folder`.

    On the CPU and without a process group. Holds one rank's part of the optimiser in memory at a time.

    Args:
        checkpoint_folder: what `Engine.save` wrote, `RUN/checkpoints/step-XXXXXX`, under ZeRO 1, 2 or 3.

    Raises:
        FileExistsError: `output_folder` exists and is not an empty folder.
        CheckpointError: the checkpoint is damaged, incomplete, names code to run, or was not written by AdamW.
    """
    with new_folder(output_folder) as aside:
        refuse_foreign_pickles(checkpoint_folder)
        check_convertible(checkpoint_folder)
        _convert(checkpoint_folder, aside)
    return output_folder


def check_convertible(folder: Path) -> None:
    """Whether every rank's part is there, with the two moments that a universal checkpoint consists of.

    Raises:
        CheckpointError: says what is missing.
    """
    for path in complete_optimiser_files(folder):
        state = read_file(path)["optimizer_state_dict"]
        groups = state["base_optimizer_state" if "base_optimizer_state" in state else "optimizer_state_dict"]["state"]
        if not groups or any("exp_avg_sq" not in group for group in groups.values()):
            raise CheckpointError(f"{path} holds no moments of AdamW; a universal checkpoint is made of them")


def _convert(folder: Path, output: Path) -> None:
    """DeepSpeed's own conversion, in this process; what it tells as it goes is shown where it fails."""
    told = io.StringIO()
    converted = output / "converted"  # beside it DeepSpeed writes `latest_universal`, which nothing reads
    settings = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(converted),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ZeRO 1 and 2 ask for a version number that the caller should have stored
    )
    try:
        with redirect_stdout(told), redirect_stderr(told):
            ds_to_universal.main(settings)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"DeepSpeed could not convert {folder}: {error!r}\n{told.getvalue()[-2000:]}") from error
    for path in converted.iterdir():
        path.rename(output / path.name)
    converted.rmdir()
    (output / "latest_universal").unlink()


class UniversalParameters(Mapping[str, Tensor]):
    """The fp32 parameters in a universal checkpoint, each read when it is asked for.

    Args:
        shapes: theirs, which ZeRO 3's conversion forgets.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, torch.Size]):
        self.folder, self.shapes = folder, shapes

    def __getitem__(self, name: str) -> Tensor:
        content = read_file(self.folder / "zero" / name / "fp32.pt")
        whole: Tensor = content["param"] if isinstance(content, dict) else content  # ZeRO 1 and 2 write a dictionary
        return whole.view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def verify_universal(trained: Mapping[str, Tensor], output_folder: Path) -> UniversalParameters:
    """Compare the fp32 weights in a universal checkpoint with the parameters `trained`; what was found.

    Raises:
        CheckpointError: names the parameter that differs, is missing, or should not be there.
    """
    found = {path.parent.name for path in output_folder.glob("zero/*/fp32.pt")}
    if foreign := sorted(found ^ set(trained)):
        raise CheckpointError(f"{output_folder} has other parameters than the checkpoint, {foreign[:3]} among them")
    shapes: dict[str, torch.Size] = {}
    weights = UniversalParameters(output_folder, shapes)
    for name, tensor in tqdm(trained.items(), desc="Comparing", unit="tensor"):
        shapes[name] = tensor.shape
        if not torch.equal(weights[name], tensor):
            raise CheckpointError(f"{output_folder}: {name} is not the checkpoint's")
    return weights
