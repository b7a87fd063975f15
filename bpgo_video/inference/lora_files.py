"""How do adapters leave on their own? One safetensors file a transformer, in diffusers' layout or in ComfyUI's.

    diffusers   transformer.LAYER.lora_A.weight, .lora_B.weight; rank, alpha and layers are in the file's metadata
    ComfyUI     diffusion_model.LAYER.lora_down.weight, .lora_up.weight, .alpha; LAYER by the model authors' own names

Both compute W + alpha/rank B A. diffusers reads either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from torch import Tensor

from bpgo_video.atomic import save_tensors
from bpgo_video.config.bpgo import LoraConfig
from bpgo_video.policies import original_names
from bpgo_video.policies.lora import ADAPTER, peft_config


def lora_file(name: str) -> str:
    """Of `transformer` what load_lora_weights looks for; of `transformer_2` pytorch_lora_weights_2.safetensors."""
    return f"pytorch_lora_weights{name.removeprefix('transformer')}.safetensors"


def load_lora(pipeline: Any, file: Path, name: str) -> None:
    """Adapters into the transformer `name` of diffusers' pipeline: in either layout, where the pipeline loads any.

    HunyuanVideo 1.5's does not; its transformer reads diffusers' layout itself.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        getattr(pipeline, name).load_lora_adapter(file.parent, weight_name=file.name, adapter_name=ADAPTER)
        return
    into = {"load_into_transformer_2": True} if name == "transformer_2" else {}
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER, **into)


def write_diffusers_lora(adapters: Mapping[str, Tensor], lora: LoraConfig, pipeline_class: str, file: Path) -> None:
    """The file that `pipeline.load_lora_weights` reads, or `transformer.load_lora_adapter`: the layout is one.

    Args:
        adapters: LAYER.lora_A.default.weight [rank, in] and LAYER.lora_B.default.weight [out, rank].
        pipeline_class: diffusers' name of it, such as WanPipeline.
    """
    writer = getattr(diffusers, pipeline_class)
    if not hasattr(writer, "save_lora_weights"):
        writer = HunyuanVideoLoraLoaderMixin  # of a transformer alone, too
    writer.save_lora_weights(
        file.parent,
        {name.replace(f".{ADAPTER}.", "."): tensor.contiguous() for name, tensor in adapters.items()},
        weight_name=file.name,
        transformer_lora_adapter_metadata=peft_config(lora).to_dict(),
    )


def write_comfyui_lora(adapters: Mapping[str, Tensor], lora: LoraConfig, pipeline_class: str, file: Path) -> None:
    """The file for ComfyUI's LoRA loader. See `write_diffusers_lora`.

    Raises:
        ConfigError: a family whose original names are not known.
    """
    name_of = original_names(pipeline_class)
    tensors: dict[str, Tensor] = {}
    for name, down in adapters.items():
        layer, half, _ = name.partition(f".lora_A.{ADAPTER}.weight")
        if half:
            up = adapters[f"{layer}.lora_B.{ADAPTER}.weight"]
            tensors |= _comfyui_layer(name_of(layer), down, up, lora)
    save_tensors(tensors, file, metadata={"format": "pt"})


def _comfyui_layer(layer: str, down: Tensor, up: Tensor, lora: LoraConfig) -> dict[str, Tensor]:
    prefix = f"diffusion_model.{layer}"
    if not layer.startswith("blocks."):  # diffusers knows alpha in the blocks only; without one both scale by 1
        return {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up * (lora.alpha / lora.rank)}
    alpha = torch.tensor(float(lora.alpha), dtype=torch.float32)
    return {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": alpha}
