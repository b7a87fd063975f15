"""How do adapters leave on their own? As one safetensors file, in diffusers' layout or in the one that ComfyUI reads.

    diffusers   transformer.LAYER.lora_A.weight, .lora_B.weight; rank, alpha and layers are in the file's metadata
    ComfyUI     diffusion_model.LAYER.lora_down.weight, .lora_up.weight, .alpha; LAYER by the model authors' own names

Both compute W + alpha/rank B A. diffusers reads either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from bpgo_video.config import LoraConfig
from bpgo_video.policies.lora import ADAPTER, peft_config
from bpgo_video.policies.original_names import original_names

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for


def write_diffusers_lora(adapters: Mapping[str, Tensor], lora: LoraConfig, pipeline_class: str, folder: Path) -> Path:
    """The file that `pipeline.load_lora_weights(folder)` reads; its path.

    Args:
        adapters: LAYER.lora_A.default.weight [rank, in] and LAYER.lora_B.default.weight [out, rank].
        pipeline_class: diffusers' name of it, such as WanPipeline.
    """
    getattr(diffusers, pipeline_class).save_lora_weights(
        folder,
        {name.replace(f".{ADAPTER}.", "."): tensor.contiguous() for name, tensor in adapters.items()},
        weight_name=LORA_WEIGHTS,
        transformer_lora_adapter_metadata=peft_config(lora).to_dict(),
    )
    return folder / LORA_WEIGHTS


def write_comfyui_lora(adapters: Mapping[str, Tensor], lora: LoraConfig, pipeline_class: str, folder: Path) -> Path:
    """The file for ComfyUI's LoRA loader; its path. See `write_diffusers_lora`.

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
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / LORA_WEIGHTS, metadata={"format": "pt"})
    return folder / LORA_WEIGHTS


def _comfyui_layer(layer: str, down: Tensor, up: Tensor, lora: LoraConfig) -> dict[str, Tensor]:
    prefix = f"diffusion_model.{layer}"
    if not layer.startswith("blocks."):  # diffusers knows alpha in the blocks only; without one both scale by 1
        return {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up * (lora.alpha / lora.rank)}
    alpha = torch.tensor(float(lora.alpha), dtype=torch.float32)
    return {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": alpha}
