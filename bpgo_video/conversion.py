"""How does a training checkpoint become a model folder? Its parts joined, adapters merged, without a process group.

    RUN/checkpoints/step-000050 and the pipeline folder that RUN/config.yaml names -> a diffusers pipeline folder

Weights are the optimiser's fp32 ones, rounded to the asked dtype before adapters are merged, as training holds them.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from bpgo_video import checkpoint
from bpgo_video.checkpoint import CheckpointError
from bpgo_video.config import ConfigError, LoraConfig
from bpgo_video.config_io import read_yaml
from bpgo_video.ema_files import average_in
from bpgo_video.engine import tensor_files
from bpgo_video.export import WEIGHTS, write_pipeline
from bpgo_video.paths import resolve_folder
from bpgo_video.policies.lora import merged_tensors
from bpgo_video.session import TRAINED
from bpgo_video.zero_files import full_state_dict

KINDS = {"raw": full_state_dict, "ema": average_in}  # of weights: a checkpoint's folder -> the trained ones, fp32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """What a conversion reads.

    Attributes:
        folder: the checkpoint, `RUN/checkpoints/step-XXXXXX`.
        base: the diffusers pipeline folder that the run started from.
        lora: its adapters; rank 0 where all weights were trained.
    """

    folder: Path
    base: Path
    lora: LoraConfig


def find_source(path: Path) -> Source:
    """The checkpoint at `path`, or the newest one of the run at `path`, with what the run's config.yaml says of it.

    Raises:
        CheckpointError: there is none; or it is none of ZeRO, or names code to run.
        ConfigError, FileNotFoundError: config.yaml, or the model folder that it names, is missing or damaged.
    """
    folder = path.resolve()
    if (folder / checkpoint.FOLDER).is_dir():
        name = checkpoint.newest(folder)
        if name is None:
            raise CheckpointError(f"{path / checkpoint.FOLDER} holds no complete checkpoint yet")
        folder = folder / checkpoint.FOLDER / name
    if not list(folder.glob("*_model_states.pt")):
        raise CheckpointError(f"{path} is neither a checkpoint (RUN/checkpoints/step-XXXXXX) nor a run's folder")
    if not list(folder.glob("*_optim_states.pt")):
        raise CheckpointError(f"{folder} has no *_optim_states.pt, where ZeRO keeps the weights; is the copy complete?")
    config_file = folder.parents[1] / "config.yaml"
    if not config_file.is_file():
        raise CheckpointError(f"{config_file} is missing: it says which model the run started from; copy it there")
    _look_at(folder)
    policy = read_yaml(config_file).policy
    return Source(folder, resolve_folder(policy.folder), policy.lora)


def _look_at(folder: Path) -> None:
    """Refuse files that name code to run or are no checkpoint files, before anything unpickles them."""
    try:
        checkpoint.refuse_foreign_pickles(folder)
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, OSError) as error:  # what torch raises over a file that it cannot read
        raise CheckpointError(f"{folder} holds a damaged .pt file ({error}); copy the checkpoint again") from error


def trained_tensors(
    source: Source, trained: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the trained transformer, under the name that it has in the base folder; adapters merged.

    Args:
        trained: the checkpoint's parameters, fp32: what a function of KINDS gives.

    Raises:
        CheckpointError: the checkpoint does not fit the base folder.
    """
    if source.lora.rank:
        adapters = {name: tensor.to(dtype) for name, tensor in trained.items() if ".lora_" in name}
        base = ((name, tensor.to(dtype)) for name, tensor in read_tensors(source.base / TRAINED))
        try:
            yield from merged_tensors(base, adapters, source.lora)
        except ValueError as error:
            raise CheckpointError(f"{source.folder} does not fit {source.base / TRAINED}: {error}") from None
        return
    names = tensor_files(source.base / TRAINED)
    missing = sorted(set(names) - set(trained))
    if missing:
        raise CheckpointError(
            f"{source.folder} lacks {len(missing)} tensors of {source.base / TRAINED}, {missing[:3]} among them"
        )
    for name in names:
        yield name, trained[name].to(dtype)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model folder's safetensors, one in memory at a time."""
    for name, path in tensor_files(folder).items():
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)


def convert_to_diffusers(
    source: Source, output: Path, dtype: torch.dtype = torch.float32, verify: bool = False, weights: str = "raw"
) -> Path:
    """Write a diffusers pipeline folder: the base folder with the trained transformer in it; written aside, renamed.

    Args:
        verify: load the result through diffusers and compare every tensor; it is left in place where they differ.
        weights: a key of KINDS, the trained ones or their average.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        CheckpointError: the checkpoint does not fit the base folder, or the result is not what was to be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty; name another --output, or delete it first")
    trained = KINDS[weights](source.folder)
    bar = partial(tqdm, total=len(tensor_files(source.base / TRAINED)), unit="tensor")
    with bar(trained_tensors(source, trained, dtype), desc="Writing") as tensors:
        write_pipeline(source.base, TRAINED, iter(tensors), output)
    if verify:
        with bar(trained_tensors(source, trained, dtype), desc="Comparing") as tensors:
            verify_pipeline(iter(tensors), source.base, output)
    return output


def verify_pipeline(expected: Iterable[tuple[str, Tensor]], base: Path, output: Path) -> None:
    """Load `output` through diffusers and compare the transformer's tensors with `expected`, other files with `base`.

    Raises:
        CheckpointError: names the tensor or the file that differs.
    """
    loaded = load_transformer(output).state_dict()
    found = {name: tensor for name, tensor in loaded.items() if not tensor.is_meta}  # meta: not in the file
    compared = set()
    for name, tensor in expected:
        if name not in found or not torch.equal(found[name].float(), tensor.float()):  # some load as fp32 on purpose
            raise CheckpointError(f"{output / TRAINED}: {name}, as diffusers loads it, is not the checkpoint's")
        compared.add(name)
    if foreign := sorted(set(found) - compared):
        raise CheckpointError(f"{output / TRAINED}: diffusers loads {foreign[:3]}, which the checkpoint does not have")
    for file in (path for path in output.rglob("*") if path.is_file()):
        relative = file.relative_to(output)
        ours = relative.parent == Path(TRAINED) and file.name.startswith(WEIGHTS)
        if not ours and not filecmp.cmp(file, base / relative, shallow=False):
            raise CheckpointError(f"{file} is not a copy of {base / relative}")


def load_transformer(folder: Path) -> torch.nn.Module:
    """The transformer as diffusers' own pipeline class loads it, in the dtype on disk; no other weights are read."""
    index = json.loads((folder / "model_index.json").read_text())
    weighty = [name for name in index if list((folder / name).glob("*.safetensors")) and name != TRAINED]
    dtypes = {tensor.dtype for _, tensor in read_tensors(folder / TRAINED)}
    pipeline = DiffusionPipeline.from_pretrained(
        folder, dtype=dtypes.pop() if len(dtypes) == 1 else None, **dict.fromkeys(weighty)
    )
    return getattr(pipeline, TRAINED)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description="Convert a training checkpoint, on the CPU, to what inference tools read."
    )
    add = top.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="RUN/checkpoints/step-XXXXXX, or RUN for its newest; ZeRO of any stage, from any number of ranks",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="new folder; an existing one is refused")
    add("--format", choices=("diffusers",), required=True, help="diffusers: a pipeline folder, adapters merged")
    add("--weights", choices=tuple(KINDS), default="raw", help="as the optimiser holds them, or their average (raw)")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of the trained weights (%(default)s)")
    add("--verify", action="store_true", help="load the result through diffusers and compare every tensor")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of tools/convert_checkpoint.py; 0 only when all was done and, if asked, checked."""
    args = parser().parse_args(arguments)
    try:
        source = find_source(args.checkpoint)
        convert_to_diffusers(source, args.output, DTYPES[args.dtype], args.verify, args.weights)
    except (CheckpointError, ConfigError, OSError, ValueError) as error:  # wrong input; else keep the traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {source.folder.name} of {source.folder.parents[1]}{', verified' if args.verify else ''}")
    return 0
