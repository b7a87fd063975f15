"""How does a pipeline take less memory while it generates, and by which kernels does it attend?

Videos decoded in tiles or one at a time as in training, and diffusers' own offload: what is not at work rests in the
host's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.inference.settings import GenerationError, GenerationSettings, Model
from bpgo_video.policies.execution import check_backend, choose_attention, split_vae_work
from bpgo_video.policies.networks import Transformers


@dataclass(frozen=True)
class Means:
    """The settings of these names, those of a training checkpoint's recipe filled in."""

    vae_tiling: bool
    vae_slicing: bool
    attention_backend: str | None


def means_of(settings: GenerationSettings, model: Model) -> Means:
    """What is asked for; else what the checkpoint's recipe says; else diffusers' own.

    Raises:
        GenerationError: an attention backend that diffusers does not know.
    """
    own = {"vae_tiling": False, "vae_slicing": False, "attention_backend": None}
    recipe = vars(model.checkpoint.config.policy) if model.checkpoint else own
    asked = {name: getattr(settings, name) for name in own}
    found: dict[str, Any] = {name: recipe[name] if value is None else value for name, value in asked.items()}
    means = Means(**found)
    try:
        check_backend(means.attention_backend, trains=False)
    except ConfigError as error:
        raise _told(error) from error
    return means


def apply(means: Means, pipeline: Any, model: Model) -> None:
    """Let a loaded pipeline decode and attend so.

    Raises:
        GenerationError: its VAE cannot, or the backend is not installed or not for this transformer.
    """
    transformers = Transformers({name: getattr(pipeline, name) for name in model.policy.transformer_names})
    try:
        split_vae_work(pipeline.vae, tiling=means.vae_tiling, slicing=means.vae_slicing)
        choose_attention(transformers, means.attention_backend, model.policy.sequence_plan, trains=False)
    except ConfigError as error:
        raise _told(error) from error


def _told(error: ConfigError) -> GenerationError:
    """By the names of the flags, which a recipe has in its section `policy`."""
    return GenerationError(str(error).replace("policy.", ""))


def whole(pipeline: Any, device: torch.device) -> None:
    """All networks on the device."""
    pipeline.to(device)


def by_model(pipeline: Any, device: torch.device) -> None:
    """One network at a time on the device."""
    pipeline.enable_model_cpu_offload(device=device)


def by_layer(pipeline: Any, device: torch.device) -> None:
    """One layer at a time on the device."""
    pipeline.enable_sequential_cpu_offload(device=device)


OFFLOADS: dict[str, Callable[[Any, torch.device], None]] = {"none": whole, "model": by_model, "sequential": by_layer}


def check_offload(offload: str, device: torch.device) -> None:
    """Whether there is a device to bring networks to.

    Raises:
        GenerationError: ranks compute on the CPU.
    """
    if offload != "none" and device.type == "cpu":
        raise GenerationError(f"offload is {offload!r}, but this machine has no GPU to bring networks to; leave it out")
