"""A pipeline folder with adapters fused into its transformers, as diffusers fuses them: the start of a run on them.

A distilled model is often published as adapters of a base model. Fused once, they are part of the folder's weights, so
that training, priors, exports and the folder's fingerprint know only one model.

OUTPUT/            the base folder, with other weights in the transformers that have adapters
OUTPUT/fused.json  {"base", "base_fingerprint", "scale", "adapters": {transformer: {"file", "sha256"}}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.files import fingerprint, new_folder, resolve_folder, write_json
from bpgo_video.inference.hub import FUSED, sha256, shown
from bpgo_video.inference.model_files import SHARD_BYTES, load_lora, write_pipeline
from bpgo_video.policies import family
from bpgo_video.policies.networks import networks_of, transformer_names
from bpgo_video.weights import WeightsError, check_finite, load_network


@dataclass(frozen=True)
class Fusion:
    """What to fuse.

    Attributes:
        base: a diffusers pipeline: folder, hub id, or `package:module/folder`.
        adapters: a safetensors file for each transformer that gets adapters, in a layout that diffusers reads.
        scale: factor of what the adapters add.
        dtype: of the fused weights, except those that diffusers keeps in fp32.
    """

    base: str
    adapters: Mapping[str, Path]
    scale: float = 1.0
    dtype: torch.dtype = torch.float32


def fuse(fusion: Fusion, output: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the fused pipeline to a new folder, complete or not at all; one transformer is in memory at a time.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        FileNotFoundError, ConfigError: no such folder or file, or the folder lacks the transformer.
        WeightsError: the folder's weights or the adapters are damaged, or do not fit each other.
    """
    base = resolve_folder(fusion.base)
    for name, file in fusion.adapters.items():
        if name not in transformer_names(base):
            raise ConfigError(f"{file} is for {name}, but {fusion.base} has only {list(transformer_names(base))}")
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; name a .safetensors file of adapters")
    record = {
        "base": shown(fusion.base),
        "base_fingerprint": fingerprint(base, transformer_names(base)),
        "scale": fusion.scale,
        "adapters": {name: {"file": file.name, "sha256": sha256(file)} for name, file in fusion.adapters.items()},
    }
    with new_folder(output) as folder:
        trained = {name: fused_tensors(fusion, base, name) for name in fusion.adapters}
        write_pipeline(base, trained, folder, shard_bytes)
        write_json(folder / FUSED, record)


def fused_tensors(fusion: Fusion, base: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of the transformer `name` with its adapters: diffusers loads, scales and fuses them."""
    transformer: Any = load_network(networks_of(base)[name], base / name, fusion.dtype)
    parts = dict.fromkeys(networks_of(base)) | {name: transformer}
    try:
        load_lora(family(base).assemble(base, parts), fusion.adapters[name], name)
    except WeightsError:
        raise
    except ValueError as error:
        raise ConfigError(f"{fusion.adapters[name]}: {error}") from error
    if not hasattr(transformer, "peft_config"):
        raise ConfigError(f"{fusion.adapters[name]} has no adapter for a layer of {base / name}; give adapters of it")
    transformer.fuse_lora(lora_scale=fusion.scale, safe_fusing=True)
    transformer.unload_lora()
    found = {key: tensor for key, tensor in transformer.state_dict().items() if not tensor.is_meta}
    check_finite(fusion.adapters[name], found.items(), "fuse with a smaller --scale")
    yield from found.items()
