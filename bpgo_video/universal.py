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
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from deepspeed.checkpoint import ds_to_universal

from bpgo_video.zero_files import CheckpointError, complete_optimiser_files, read_file, refuse_foreign_pickles


def to_universal(checkpoint_folder: Path, output_folder: Path) -> Path:
    """Write the universal form of a checkpoint, aside and then renamed; the folder `output_folder`.

    On the CPU and without a process group. Holds one rank's part of the optimiser in memory at a time.

    Args:
        checkpoint_folder: what `Engine.save` wrote, `RUN/checkpoints/step-XXXXXX`, under ZeRO 1, 2 or 3.

    Raises:
        FileExistsError: `output_folder` exists.
        CheckpointError: the checkpoint is damaged, incomplete, names code to run, or was not written by AdamW.
    """
    if output_folder.exists():
        raise FileExistsError(f"{output_folder} exists; name another output, or delete it first")
    refuse_foreign_pickles(checkpoint_folder)
    check_convertible(checkpoint_folder)
    aside = output_folder.with_name(f"partial-{output_folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / "whole").mkdir(parents=True)  # DeepSpeed writes `latest_universal` beside its output
        _convert(checkpoint_folder, aside / "whole")
        (aside / "whole").rename(output_folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
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
    settings = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(output),
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
