"""Conversion of a training checkpoint to files for inference, on the CPU, one tensor at a time.

    diffusers   a pipeline folder, or its transformer alone; adapters merged into the base weights
    lora        adapters only, for `load_lora_weights`
    comfyui     adapters in ComfyUI's layout; with --merged, or for a run without adapters, whole transformers
    universal   DeepSpeed's checkpoint for any number of ranks

Memory holds the adapters and one file of the output, twice during its writing (for a whole ComfyUI transformer: two
tensors). Verification loads the output with diffusers, one transformer at a time, and compares every tensor and a
forward pass with the base model under the checkpoint's weights.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.policy import LoraConfig
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.zero_files import to_universal, verify_universal
from bpgo_video.errors import some_of
from bpgo_video.files import new_folder
from bpgo_video.inference import model_files
from bpgo_video.inference.hub import CARD, EXPORTED, CardFacts, Repository, write_card
from bpgo_video.inference.model_files import SHARD_BYTES, WEIGHTS_NAME, Tensors, lora_file
from bpgo_video.inference.run_weights import (
    WEIGHTS,
    Checkpoint,
    adapter_tensors,
    load_trained,
    trained_tensor,
    trained_tensors,
)
from bpgo_video.policies import family, load_policy, original_names
from bpgo_video.policies.lora import ADAPTER
from bpgo_video.policies.networks import Transformers, networks_of, transformer_names
from bpgo_video.rollouts.conditioning import cast
from bpgo_video.weights import WeightsError, load_network

NOISE_LEVELS = (0.7, 0.99, 0.05)  # one for each transformer of a pipeline with several
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative: merged and added adapters round differently


@dataclass(frozen=True)
class Conversion:
    """What to convert, and how.

    Attributes:
        checkpoint: the checkpoint, and the model that its run started from.
        weights: a name of `WEIGHTS`.
        output: a new folder.
        dtype: dtype of the trained weights, except those that diffusers keeps in fp32.
        transformer_only: write the transformer's folder instead of the pipeline's; format diffusers.
        merged: write the whole transformer instead of its adapters; format comfyui.
        shard_bytes: size limit of a safetensors file, and of the buffer in memory; format diffusers.
        repository: where to upload the output, if anywhere.
    """

    checkpoint: Checkpoint
    weights: str
    output: Path
    dtype: torch.dtype = torch.float32
    transformer_only: bool = False
    merged: bool = False
    shard_bytes: int = SHARD_BYTES
    repository: Repository | None = None

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The checkpoint's fp32 parameters, each read when it is needed."""
        return WEIGHTS[self.weights](self.checkpoint.folder)

    @property
    def lora(self) -> LoraConfig:
        return self.checkpoint.config.policy.lora

    @property
    def writes_whole(self) -> bool:
        """Whether ComfyUI gets whole transformers."""
        return self.merged or not self.lora.rank

    def adapters(self, name: str) -> dict[str, Tensor]:
        """The adapters of a trained transformer in the output's dtype."""
        found = adapter_tensors(self.checkpoint, name, self.trained)
        return {key: tensor.to(self.dtype) for key, tensor in found.items()}

    def load(self, name: str, folder: Path | None = None) -> Any:
        """The transformer `name` of the base model, or from a folder of its own."""
        model_class = networks_of(self.checkpoint.base)[name]
        return load_network(model_class, folder or self.checkpoint.base / name, self.dtype)

    def transformer_folder(self, name: str, output: Path) -> Path:
        """The folder of a trained transformer in format diffusers; `output` itself for a single one alone."""
        return output if self.transformer_only and len(self.checkpoint.trained) == 1 else output / name

    def tensors(self, action: str, name: str) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a trained transformer, with a progress bar."""
        tensors = trained_tensors(self.checkpoint, name, self.trained, self.dtype)
        return iter(tqdm(tensors, total=len(self.checkpoint.files(name)), desc=f"{action} {name}", unit="tensor"))

    def renamed(self, action: str, name: str) -> Tensors:
        """`tensors` by the authors' names."""
        name_of = original_names(self.checkpoint.pipeline_class)
        return ((name_of(key), tensor) for key, tensor in self.tensors(action, name))


def write_diffusers(job: Conversion, folder: Path) -> str:
    base, trained = job.checkpoint.base, {name: job.tensors("Writing", name) for name in job.checkpoint.trained}
    if not job.transformer_only:
        model_files.write_pipeline(base, trained, folder, job.shard_bytes)
        return EXPORTED
    for name, tensors in trained.items():
        part = job.transformer_folder(name, folder)
        part.mkdir(exist_ok=True)
        shutil.copyfile(base / name / "config.json", part / "config.json")
        model_files.write_weights(tensors, part, job.shard_bytes)
    return "Transformers for a diffusers pipeline"


def load_diffusers(job: Conversion, name: str) -> Any:
    if not job.transformer_only:
        check_copies(job.checkpoint.base, job.output, job.checkpoint.trained)
    folder = job.transformer_folder(name, job.output)
    try:
        transformer = job.load(name, folder)
    except WeightsError as error:
        raise CheckpointError(f"the export is not what was written: {error}") from error
    found = {key: tensor for key, tensor in transformer.state_dict().items() if not tensor.is_meta}  # meta: in no file
    check_tensors(folder, job.tensors("Comparing", name), found, found.__getitem__)
    return transformer


def write_lora(job: Conversion, folder: Path, write: Callable[..., None] = model_files.write_diffusers_lora) -> str:
    for name in job.checkpoint.trained:
        write(job.adapters(name), job.lora, job.checkpoint.pipeline_class, folder / lora_file(name))
    return "LoRA adapters for diffusers"


def load_lora(job: Conversion, name: str) -> Any:
    """The base transformer with the adapters that diffusers loads from the output, each compared: alpha/rank B A.

    Raises:
        CheckpointError: names the layer that differs.
    """
    source, file, adapters = job.checkpoint, job.output / lora_file(name), job.adapters(name)
    transformer = job.load(name)
    parts = dict.fromkeys(networks_of(source.base)) | dict.fromkeys(transformer_names(source.base), transformer)
    pipeline = family(source.base, source.config.policy.family).assemble(source.base, parts)  # no other weights
    model_files.load_lora(pipeline, file, name)
    layers = {key: layer for key, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}
    adapted, scale = {key.partition(".lora_")[0] for key in adapters}, job.lora.alpha / job.lora.rank
    if missing := adapted - set(layers):
        raise CheckpointError(f"{file}: diffusers loads no adapters for layers {some_of(missing)}; convert again")
    for key, layer in tqdm(layers.items(), desc="Comparing", unit="layer"):
        found = layer.get_delta_weight(ADAPTER).float()
        expected = torch.zeros_like(found)  # diffusers adds adapters of zeros to Wan's image keys
        if key in adapted:
            down, up = (adapters[f"{key}.lora_{half}.{ADAPTER}.weight"].float() for half in "AB")
            expected = scale * (up @ down)
        if not torch.linalg.norm(found - expected) <= TOLERANCE[job.dtype] * torch.linalg.norm(expected):
            raise CheckpointError(f"{file}: the adapter of {key} differs from the checkpoint's; convert again")
    return transformer


def write_comfyui(job: Conversion, folder: Path) -> str:
    if not job.writes_whole:
        write_lora(job, folder, model_files.write_comfyui_lora)
        return "LoRA adapters for ComfyUI"
    source, name_of = job.checkpoint, original_names(job.checkpoint.pipeline_class)
    for name in source.trained:
        shapes = model_files.shapes_of(source.files(name))
        layout = {name_of(key): (shape, source.dtype_of(name, key, job.dtype)) for key, shape in shapes.items()}
        model_files.write_single_file(folder / f"{name}.safetensors", layout, job.renamed("Writing", name))
    return "A transformer for ComfyUI, by its authors' names"


def load_comfyui(job: Conversion, name: str) -> Any:
    if not job.writes_whole:
        return load_lora(job, name)
    path, config = job.output / f"{name}.safetensors", job.checkpoint.base / name
    with safe_open(path, framework="pt") as file:
        check_tensors(path, job.renamed("Comparing", name), file.keys(), file.get_tensor)
    model_class = networks_of(job.checkpoint.base)[name]
    return model_class.from_single_file(str(path), config=str(config), torch_dtype=job.dtype)


def write_universal(job: Conversion, folder: Path) -> str:
    for name in job.trained:
        trained_tensor(job.checkpoint, job.trained, name)
    to_universal(job.checkpoint.folder, folder)
    return "DeepSpeed's universal checkpoint"


def load_universal(job: Conversion, name: str) -> None:
    """Compare the fp32 weights bit for bit; equal weights need no forward pass."""
    verify_universal(job.trained, job.output)


@dataclass(frozen=True)
class Format:
    """An output format.

    Attributes:
        write: fills a folder; returns its description for the model card.
        load: the output's transformer of a name, after its tensors were compared with the checkpoint's; None if that
            comparison is enough.
        options: supported fields of DEFAULTS.
    """

    write: Callable[[Conversion, Path], str]
    load: Callable[[Conversion, str], Any]
    options: tuple[str, ...] = ()


# Options that some formats do not support: they refuse other values than these.
DEFAULTS = {"weights": "raw"} | {one.name: one.default for one in fields(Conversion) if one.default is not MISSING}
FLAGS = {"shard_bytes": "shard-gigabytes", "repository": "push-to-hub"}  # where it is not the option's name
FORMATS = {
    "diffusers": Format(
        write_diffusers, load_diffusers, ("weights", "dtype", "transformer_only", "shard_bytes", "repository")
    ),
    "lora": Format(write_lora, load_lora, ("weights", "dtype", "repository")),
    "comfyui": Format(write_comfyui, load_comfyui, ("weights", "dtype", "merged", "repository")),
    "universal": Format(write_universal, load_universal),
}


def convert(job: Conversion, form: str, verify: bool = False) -> str | None:
    """Write a new folder, complete or not at all; optionally verify it, and upload it; returns its address on the hub.

    Raises:
        FileExistsError: `job.output` exists and is not an empty folder.
        CheckpointError: the checkpoint does not fit the base folder, or see `verify_output`.
        ConfigError: the format does not support an option, or has no names for the family's layers; see `Repository`.
    """
    for option, default in DEFAULTS.items():
        if option not in FORMATS[form].options and getattr(job, option) != default:
            flag = FLAGS.get(option, option.replace("_", "-"))
            formats = " or ".join(name for name, one in FORMATS.items() if option in one.options)
            raise ConfigError(f"--format {form} does not support --{flag}; remove it, or write --format {formats}")
    source, repository = job.checkpoint, job.repository
    if repository is not None:
        repository.create()
    with new_folder(job.output) as folder:
        contents = FORMATS[form].write(job, folder)
        write_card(CardFacts(source.config, source.step, job.weights, contents, source.code), folder)
    if verify:
        verify_output(job, form)
    if repository is None:
        return None
    message = f"{job.weights} weights after {source.step} steps of {source.config.algorithm}, by bpgo-video"
    return repository.upload(job.output, message, folders=(source.folder.parents[1], source.base.resolve()))


def verify_output(job: Conversion, form: str) -> None:
    """Load a converted checkpoint; compare every tensor, and the velocity of each transformer.

    Raises:
        CheckpointError: names a difference larger than rounding; the output stays.
    """
    for name in job.checkpoint.trained:
        transformer = FORMATS[form].load(job, name)
        if transformer is None:
            continue
        trained = job.load(name)
        load_trained(trained, job.checkpoint, name, job.trained, job.dtype)
        expected = velocity(job.checkpoint, name, trained)
        found = velocity(job.checkpoint, name, transformer)
        error = float((found - expected).norm() / expected.norm())
        if not error <= TOLERANCE[job.dtype]:
            raise CheckpointError(
                f"{job.output}: the relative error of its forward pass is {error:.2g}, and rounding explains "
                f"{TOLERANCE[job.dtype]}; convert again"
            )


def check_tensors(place: Path, expected: Tensors, names: Collection[str], read: Callable[[str], Tensor]) -> None:
    """Compare the tensors `names` of an export with the checkpoint's; the dtype may differ if the values do not.

    Raises:
        CheckpointError: names a tensor that differs, is missing, or is not in the checkpoint.
    """
    rest = set(names)
    for name, tensor in expected:
        if name not in rest or not torch.equal(read(name).float(), tensor.float()):
            raise CheckpointError(f"{place}: {name} differs from the checkpoint's, or is missing; convert again")
        rest.remove(name)
    if rest:
        raise CheckpointError(f"{place} holds {some_of(rest)}, which the checkpoint does not have; convert again")


def check_copies(base: Path, output: Path, trained: Collection[str]) -> None:
    """Compare everything in a pipeline folder except trained weights and card with the base folder.

    Raises:
        CheckpointError: names the file that differs.
    """
    for file in (path for path in output.rglob("*") if path.is_file()):
        relative = file.relative_to(output)
        written = relative == Path(CARD) or (str(relative.parent) in trained and file.name.startswith(WEIGHTS_NAME))
        if not written and not filecmp.cmp(file, base / relative, shallow=False):
            raise CheckpointError(f"{file} is not a copy of {base / relative}; convert again")


def velocity(source: Checkpoint, name: str, transformer: Any) -> Tensor:
    """The policy's velocity for its example input with this transformer as `name`, at a noise level that uses it."""
    own = source.config.policy
    policy = load_policy(str(source.base), max_sequence_length=1, components=(), name=own.family, options=own.options)
    latents, conditioning = policy.example()
    policy.transformers = Transformers({name: transformer.eval()})
    sigma = next(level for level in NOISE_LEVELS if policy.transformer_at(level) == name)
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor(sigma), cast(conditioning, transformer.dtype))
