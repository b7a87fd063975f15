"""Conversion of a training checkpoint to what inference tools read, on the CPU, one tensor at a time.

    diffusers   a pipeline folder, or its transformer alone; adapters merged into the weights that the run started from
    lora        the adapters on their own, for `load_lora_weights`
    comfyui     the same in the layout that ComfyUI reads; merged, or of a run without adapters, whole transformers
    universal   DeepSpeed's checkpoint for any number of ranks

Memory holds one file of the output, twice while it is written (two tensors of a whole transformer for ComfyUI), and the
adapters. Verifying loads one transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bpgo_video.atomic import new_folder
from bpgo_video.config.bpgo import ConfigError, LoraConfig
from bpgo_video.distributed.zero_files import to_universal, verify_universal
from bpgo_video.inference.lora_files import lora_file, write_comfyui_lora, write_diffusers_lora
from bpgo_video.inference.model_card import EXPORTED, CardFacts, write_card
from bpgo_video.inference.pipeline_folder import SHARD_BYTES, write_pipeline, write_transformers
from bpgo_video.inference.run_weights import WEIGHTS, Source, adapter_tensors, trained_tensors
from bpgo_video.inference.single_file import renamed, shapes_of, verify_single_file, write_single_file
from bpgo_video.inference.verification import (
    compare_forward,
    expected_forward,
    forward,
    load_single_file,
    verify_adapters,
    verify_copies,
    verify_transformer,
)
from bpgo_video.policies import original_names

ALONE = "Transformers for a diffusers pipeline"


@dataclass(frozen=True)
class Conversion:
    """What is converted into what.

    Attributes:
        source: the checkpoint, and the model that its run started from.
        weights: a name of `WEIGHTS`.
        output: a new folder.
        dtype: of the trained weights in it, except those that diffusers keeps in fp32.
        transformer_only: write the transformer's folder instead of the whole pipeline's; format diffusers.
        merged: write the whole transformer instead of its adapters; format comfyui.
        shard_bytes: size of a safetensors file, and of the buffer in memory.
    """

    source: Source
    weights: str
    output: Path
    dtype: torch.dtype = torch.float32
    transformer_only: bool = False
    merged: bool = False
    shard_bytes: int = SHARD_BYTES

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The checkpoint's parameters, fp32, each read when it is asked for."""
        return WEIGHTS[self.weights](self.source.folder)

    def adapters(self, name: str) -> dict[str, Tensor]:
        """Of a transformer, in the dtype of the output."""
        found = adapter_tensors(self.source, name, self.trained)
        return {key: tensor.to(self.dtype) for key, tensor in found.items()}

    @property
    def lora(self) -> LoraConfig:
        return self.source.config.policy.lora

    def folder_of(self, name: str) -> Path:
        """Where a trained transformer lies."""
        return self.output if self.transformer_only and len(self.source.trained) == 1 else self.output / name

    def card(self, contents: str) -> CardFacts:
        return CardFacts(self.source.config, self.source.step, self.weights, contents, self.source.code)

    def tensors(self, doing: str, name: str) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a trained transformer, behind a bar."""
        every = trained_tensors(self.source, name, self.trained, self.dtype)
        return iter(tqdm(every, total=len(self.source.files(name)), desc=f"{doing} {name}", unit="tensor"))


def write_diffusers(job: Conversion) -> None:
    write, contents = (write_transformers, ALONE) if job.transformer_only else (write_pipeline, EXPORTED)
    trained = {name: job.tensors("Writing", name) for name in job.source.trained}
    write(job.source.base, trained, job.output, job.card(contents), job.shard_bytes)


def verify_diffusers(job: Conversion) -> None:
    if not job.transformer_only:
        verify_copies(job.source.base, job.output, job.source.trained)
    for name in job.source.trained:
        expected = expected_forward(job.source, name, job.trained, job.dtype)
        transformer = verify_transformer(job.tensors("Comparing", name), job.folder_of(name))
        compare_forward(forward(job.source, name, transformer), expected, job.dtype, job.output)


def write_adapters(job: Conversion, write: Callable[..., None], contents: str) -> None:
    with new_folder(job.output) as folder:
        for name in job.source.trained:
            write(job.adapters(name), job.lora, job.source.pipeline_class, folder / lora_file(name))
        write_card(job.card(contents), folder)


def verify_lora(job: Conversion) -> None:
    for name in job.source.trained:
        expected = expected_forward(job.source, name, job.trained, job.dtype)
        file = job.output / lora_file(name)
        transformer = verify_adapters(job.adapters(name), job.lora, job.source, name, file)
        compare_forward(forward(job.source, name, transformer), expected, job.dtype, job.output)


def leaves_whole(job: Conversion) -> bool:
    """Whether ComfyUI gets whole transformers: that is asked for, or there are no adapters."""
    return job.merged or not job.lora.rank


def write_comfyui(job: Conversion) -> None:
    if not leaves_whole(job):
        write_adapters(job, write_comfyui_lora, "LoRA adapters for ComfyUI")
        return
    name_of = original_names(job.source.pipeline_class)
    with new_folder(job.output) as folder:
        for name in job.source.trained:
            shapes = shapes_of(job.source.files(name))
            layout = {name_of(key): (shape, job.source.dtype_of(name, key, job.dtype)) for key, shape in shapes.items()}
            tensors = renamed(job.tensors("Writing", name), name_of)
            write_single_file(folder / f"{name}.safetensors", layout, tensors)
        write_card(job.card("A transformer for ComfyUI, by its authors' names"), folder)


def verify_comfyui(job: Conversion) -> None:
    if not leaves_whole(job):
        verify_lora(job)
        return
    for name in job.source.trained:
        file, name_of = job.output / f"{name}.safetensors", original_names(job.source.pipeline_class)
        expected = expected_forward(job.source, name, job.trained, job.dtype)
        verify_single_file(file, renamed(job.tensors("Comparing", name), name_of))
        transformer = load_single_file(file, job.source.base / name, job.dtype)
        compare_forward(forward(job.source, name, transformer), expected, job.dtype, job.output)


def write_universal(job: Conversion) -> None:
    to_universal(job.source.folder, job.output)
    write_card(job.card("DeepSpeed's universal checkpoint"), job.output)


def verify_optimiser_weights(job: Conversion) -> None:
    verify_universal(job.trained, job.output)


@dataclass(frozen=True)
class Format:
    """One thing that a checkpoint becomes: how it is written, how it is checked, for whom it is.

    Attributes:
        takes: the settings that it heeds, of those in OPTIONS.
    """

    write: Callable[[Conversion], object]
    verify: Callable[[Conversion], None]
    purpose: str
    takes: frozenset[str]


OPTIONS: dict[
    str, tuple[str, object]
] = {  # flag -> its field of a conversion, and what that is when nothing is asked for
    "weights": ("weights", "raw"),
    "dtype": ("dtype", torch.float32),
    "transformer-only": ("transformer_only", False),
    "merged": ("merged", False),
    "shard-gigabytes": ("shard_bytes", SHARD_BYTES),
}
FORMATS = {
    "diffusers": Format(
        write_diffusers,
        verify_diffusers,
        "a pipeline folder, adapters merged",
        frozenset({"weights", "dtype", "transformer-only", "shard-gigabytes"}),
    ),
    "lora": Format(
        partial(write_adapters, write=write_diffusers_lora, contents="LoRA adapters for diffusers"),
        verify_lora,
        "adapters for load_lora_weights",
        frozenset({"weights", "dtype"}),
    ),
    "comfyui": Format(
        write_comfyui,
        verify_comfyui,
        "adapters for ComfyUI, or with --merged, and of a run without adapters, whole transformers",
        frozenset({"weights", "dtype", "merged"}),
    ),
    "universal": Format(
        write_universal,
        verify_optimiser_weights,
        "DeepSpeed's checkpoint for any number of ranks, as the optimiser holds it",
        frozenset(),
    ),
}


def convert(job: Conversion, form: str, verify: bool = False) -> None:
    """Write a new folder, complete or not at all; with `verify`, load it again and compare every tensor and a forward.

    What fails the comparison is left in place.

    Raises:
        FileExistsError: `job.output` exists and is not an empty folder.
        CheckpointError: the checkpoint does not fit the base folder, or the result is not what was to be written.
        ConfigError: the format has no names for the family's layers, or does not heed a setting.
    """
    for option, (field, default) in OPTIONS.items():
        if option not in FORMATS[form].takes and getattr(job, field) != default:
            takers = " or ".join(name for name, one in FORMATS.items() if option in one.takes)
            raise ConfigError(f"--format {form} heeds no --{option}; leave it out, or write --format {takers}")
    if job.output.exists() and (not job.output.is_dir() or any(job.output.iterdir())):
        raise FileExistsError(f"{job.output} exists and is not empty; name another --output, or delete it first")
    FORMATS[form].write(job)
    if verify:
        FORMATS[form].verify(job)
