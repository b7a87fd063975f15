"""DeepSpeed's checkpoint files: read without running code, as whole parameters, and converted to universal form.

    [zero_pp_rank_R_]mp_rank_00_model_states.pt        model and run state; under ZeRO-3 one per rank
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   rank R's part of the optimizer and of the fp32 weights

ZeRO 1 and 2 flatten the parameters of a group into one vector and cut it into one piece per rank. ZeRO 3 cuts every
parameter: rank r's vector has the r-th part of each, ceil(numel / ranks) values, padded at the end.

A universal checkpoint, which DeepSpeed loads on any number of ranks, under ZeRO 1 or 2 if one of them wrote the
original, else under ZeRO 3:

    OUTPUT/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt   each parameter whole, with its optimizer state
    OUTPUT/zero/optimizer_state.pt                       state shared by all parameters
    OUTPUT/*_model_states.pt                             unchanged, with the run's state
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from tqdm import tqdm

from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.optimizer import Shard
from bpgo_video.files import new_folder

ALLOWED = (ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address)  # in DeepSpeed's own files
ALLOWED_GLOBALS = {f"{kind.__module__}.{kind.__qualname__}" for kind in ALLOWED}


def refuse_foreign_pickles(folder: Path) -> None:
    """Check which globals a checkpoint's files name, before DeepSpeed unpickles them; runs no code.

    Raises:
        CheckpointError: a file is damaged, or names a global that DeepSpeed's own checkpoints do not have.
    """
    for path in sorted(folder.rglob("*.pt")):
        try:
            foreign = set(get_unsafe_globals_in_checkpoint(path)) - ALLOWED_GLOBALS
        except (RuntimeError, ValueError, OSError) as error:  # torch's errors for unreadable files
            raise CheckpointError(f"{path} is damaged ({error}); copy the checkpoint again") from error
        if foreign:
            raise CheckpointError(
                f"{path} names {sorted(foreign)}, which no checkpoint of this program does: refused, as loading it "
                "could run foreign code"
            )


def read_file(path: Path, mapped: bool = True) -> Any:
    """A file of a checkpoint.

    Args:
        mapped: tensors are mapped into memory, and read when they are used; the file must stay until then.

    Raises:
        CheckpointError: the file is damaged, or see `refuse_foreign_pickles`.
    """
    try:
        with safe_globals(list(ALLOWED)):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except (RuntimeError, ValueError, OSError, UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged, or not a file of DeepSpeed's ({error})") from error


def model_file(folder: Path) -> Path:
    """The file with the run's state and all parameters' shapes: the only one, or rank 0's.

    Raises:
        CheckpointError: there is none.
    """
    files = sorted(folder.glob("*mp_rank_00_model_states.pt"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise CheckpointError(f"{folder} has no *_model_states.pt; is it a checkpoint, RUN/checkpoints/step-XXXXXX?")
    return files[0]


def optimizer_files(folder: Path) -> list[Path]:
    """The optimizer file of every rank that wrote the checkpoint, ordered by rank.

    Raises:
        CheckpointError: there is none, or a rank's is missing.
    """
    by_rank = {
        int(match[1]): path
        for path in folder.glob("*_optim_states.pt")
        if (match := re.search(r"zero_pp_rank_(\d+)_", path.name))
    }
    if not by_rank:
        raise CheckpointError(f"{folder} has no *_optim_states.pt, where ZeRO keeps the weights; is the copy complete?")
    ranks = sorted(by_rank)
    counts = read_file(by_rank[ranks[0]])["optimizer_state_dict"]["partition_count"]  # ZeRO 1 and 2: one per group
    expected = max(counts) if isinstance(counts, list) else counts
    if ranks != list(range(expected)):
        raise CheckpointError(
            f"{folder} was written by {expected} ranks and holds *_optim_states.pt of ranks {ranks}; is the copy "
            "complete?"
        )
    return [by_rank[rank] for rank in ranks]


Vector = Sequence[Tensor]  # laid end to end
Shapes = Mapping[str, torch.Size]


class StoredParameters(Mapping[str, Tensor]):
    """fp32 parameters, by name, whose elements are spread over mapped files; a lookup copies that parameter alone.

    Attributes:
        shapes: of the whole parameters.
        pieces: of each parameter: (index of the first element, number of elements, tensor or object to slice).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[tuple[int, int, Any]]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, 0, prod(self.shapes[name])).view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def load_into(self, shard: Shard) -> None:
        """Overwrite the values of any rank's shard.

        Raises:
            CheckpointError: the parameter has another shape here, or a file is missing.
        """
        if self.shapes.get(shard.name) != shard.shape:
            raise CheckpointError(
                f"{self.folder} has {shard.name} as {self.shapes.get(shard.name)}, the model as {shard.shape}; is it a "
                "checkpoint of this model?"
            )
        shard.values.copy_(self._read(shard.name, shard.start, shard.start + shard.values.numel()))

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        found, missing = torch.empty(stop - start), stop - start
        for first, count, piece in self.pieces[name]:
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                found[low - start : high - start] = piece[low - first : high - first]
                missing -= high - low
        if missing:
            raise CheckpointError(f"{self.folder} lacks {missing} elements of {name}; copy the checkpoint again")
        return found


class ZeroParameters(StoredParameters):
    """The trained parameters and buffers in a checkpoint that ZeRO 1, 2 or 3 wrote on any number of ranks.

    Bit-equal to DeepSpeed's `get_fp32_state_dict_from_zero_checkpoint(exclude_frozen_parameters=True)`. Needs no
    process group.

    Args:
        moment: one of `MOMENTS`, to read AdamW's average of each parameter's gradient instead.

    Attributes:
        updates: of the optimizer, by parameter, if a moment is read; 0 if it has never updated the parameter.

    Raises:
        CheckpointError: a file is damaged, missing or names code, or its length does not fit the parameters.
    """

    def __init__(self, folder: Path, moment: str | None = None):
        super().__init__(folder)
        self.updates: dict[str, float] = {}
        model, files = read_file(model_file(folder)), optimizer_files(folder)
        states = [read_file(path)["optimizer_state_dict"] for path in files]
        saved = {name: model["module"][name] for name in model["buffer_names"] if name in model["module"]}
        self._buffers = {name: one.float() if one.is_floating_point() else one for name, one in saved.items()}
        self.shapes.update({name: tuple(buffer.shape) for name, buffer in self._buffers.items()})
        groups = model["param_shapes"]
        zero3 = int(states[0]["zero_stage"]) == 3
        key = "fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups"
        by_rank = [state[key] for state in states]
        if moment is not None:
            adam = states[0]["optimizer_state_dict" if zero3 else "base_optimizer_state"]["state"]
            updates = [float(adam.get(number, {}).get("step", 0.0)) for number in range(len(groups))]
            self.updates = {name: count for shapes, count in zip(groups, updates, strict=True) for name in shapes}
            by_rank = [_moments(state, by, moment, zero3) for state, by in zip(states, by_rank, strict=True)]
        if zero3:
            self._locate({name: shape for shapes in groups for name, shape in shapes.items()}, by_rank)
        else:
            paddings = states[0].get("param_alignment_paddings") or [None] * len(groups)
            for number, (shapes, padding) in enumerate(zip(groups, paddings, strict=True)):
                self._locate(shapes, [[parts[number] for parts in by_rank]], padding, 2 * len(by_rank))
        for alias, name in model["shared_params"].items():
            if name in self.pieces:
                self.shapes[alias], self.pieces[alias] = self.shapes[name], self.pieces[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name].clone() if name in self._buffers else super().__getitem__(name)

    def _locate(self, shapes: Shapes, vectors: Sequence[Vector], padding: Any = None, unit: int = 1) -> None:
        """Find the pieces of parameters, each of which is cut into one part per vector.

        Args:
            padding: number of values after each parameter, if DeepSpeed aligned them.
            unit: DeepSpeed pads vectors to a multiple of it, or drops the padding.
        """
        start = 0
        for (name, shape), gap in zip(shapes.items(), padding or [0] * len(shapes), strict=True):
            length, first = -(-shape.numel() // len(vectors)), 0
            self.shapes[name], self.pieces[name] = tuple(shape), []
            for vector in vectors:
                for piece in _cut(vector, start, start + min(length, shape.numel() - first)):
                    self.pieces[name].append((first, piece.numel(), piece))
                    first += piece.numel()
            start += length + gap
        for vector in vectors:
            held = sum(part.numel() for part in vector)
            if -(-start // unit) != -(-held // unit):
                raise CheckpointError(
                    f"{self.folder}: the parameters take {start} values, the files hold {held}; is the copy complete?"
                )


def _moments(state: Mapping[str, Any], weights: Vector, moment: str, zero3: bool) -> Vector:
    """A rank's vectors of a moment; zeros for groups that the optimizer has never updated."""
    adam = state["optimizer_state_dict" if zero3 else "base_optimizer_state"]["state"]
    never = torch.zeros(())
    return [adam.get(number, {}).get(moment, never.expand(len(part))) for number, part in enumerate(weights)]


def _cut(parts: Vector, start: int, stop: int) -> list[Tensor]:
    """The values of a vector from `start` to `stop`."""
    found, first = [], 0
    for part in parts:
        low, high = max(start, first), min(stop, first + part.numel())
        if low < high:
            found.append(part[low - first : high - first])
        first += part.numel()
    return found


def to_universal(checkpoint_folder: Path, output_folder: Path) -> Path:
    """Write a checkpoint's universal form, complete or not at all; `output_folder`.

    Runs on the CPU without a process group, with one rank's part of the optimizer in memory at a time.

    Args:
        checkpoint_folder: `RUN/checkpoints/step-XXXXXX`, written under ZeRO 1, 2 or 3.

    Raises:
        FileExistsError: `output_folder` exists and is not an empty folder.
        CheckpointError: the checkpoint is damaged or incomplete, names code, or was not written with AdamW.
    """
    with new_folder(output_folder) as partial:
        refuse_foreign_pickles(checkpoint_folder)
        for path in optimizer_files(checkpoint_folder):
            state = read_file(path)["optimizer_state_dict"]
            group = state["base_optimizer_state" if "base_optimizer_state" in state else "optimizer_state_dict"]
            if not group["state"] or any("exp_avg_sq" not in one for one in group["state"].values()):
                raise CheckpointError(f"{path} holds no moments of AdamW, which a universal checkpoint consists of")
        _convert(checkpoint_folder, partial)
    return output_folder


def _convert(folder: Path, output: Path) -> None:
    """Run DeepSpeed's conversion in this process; its output is shown only if it fails."""
    log = io.StringIO()
    converted = output / "converted"  # DeepSpeed also writes `latest_universal` next to it, which nothing reads
    settings = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(converted),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ZeRO 1 and 2 require a version number in the caller's state
    )
    try:
        with redirect_stdout(log), redirect_stderr(log):
            ds_to_universal.main(settings)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"DeepSpeed could not convert {folder}: {error!r}\n{log.getvalue()[-2000:]}") from error
    for path in converted.iterdir():
        path.rename(output / path.name)
    converted.rmdir()
    (output / "latest_universal").unlink()


def verify_universal(trained: Mapping[str, Tensor], output_folder: Path) -> None:
    """Check that the fp32 weights in a universal checkpoint equal `trained`, bit for bit.

    Raises:
        CheckpointError: names the parameter that differs, is missing, or should not exist.
    """
    found = {path.parent.name for path in output_folder.glob("zero/*/fp32.pt")}
    if unexpected := sorted(found ^ set(trained)):
        raise CheckpointError(f"{output_folder} has other parameters than the checkpoint, such as {unexpected[:3]}")
    for name, tensor in tqdm(trained.items(), desc="Comparing", unit="tensor"):
        content = read_file(output_folder / "zero" / name / "fp32.pt")
        weights = content["param"] if isinstance(content, dict) else content  # ZeRO 1 and 2 write a dictionary
        if not torch.equal(weights.flatten(), tensor.flatten()):  # ZeRO 3's conversion loses the shapes
            raise CheckpointError(f"{output_folder}: {name} is not the checkpoint's")
