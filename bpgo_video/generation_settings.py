"""What can be asked of a generation? Its flags, and the pipeline's own values where a flag is left out."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from pydantic.dataclasses import dataclass as checked_dataclass

from bpgo_video.config import STRICT, Positive, VideoConfig
from bpgo_video.policies import Policy, load_policy

WAN_FPS = 16.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class GenerationError(ValueError):
    """Settings, or an output folder, with which nothing can be generated; the message says what to change."""


@checked_dataclass(frozen=True, config=STRICT)
class GenerationSettings:
    """Generate videos with a policy: prompts in, mp4 files and a manifest out. What exists already is skipped."""

    policy: str
    """A diffusers pipeline, such as a run's export: local folder, hub id, or `package:module/folder`."""
    prompts: Path
    """.txt, one prompt a line; or .jsonl, {"prompt", "id"?, "split"?, "tags"?} a line."""
    output: Path
    """Folder for the videos; a generation of the same settings that was cut short there is continued."""
    seed: int
    """The initial latents of a video are a function of this, its prompt's id and its sample number."""
    lora: Path | None = None
    """Adapters to load on top, a .safetensors file in a layout that diffusers reads."""
    negative_prompt: str = ""
    """What guidance steers away from."""
    num_steps: Positive | None = None
    """Denoising steps; None takes the pipeline's own default (50 for Wan), as for the next six."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 switches it off."""
    num_frames: Positive | None = None
    """Frames of a video."""
    height: Positive | None = None
    """Pixels."""
    width: Positive | None = None
    """Pixels."""
    max_sequence_length: Positive | None = None
    """Text tokens, as in training; None takes the tokenizer's own limit where that is below the pipeline's."""
    fps: float = WAN_FPS
    """Frames a second of the files."""
    samples_per_prompt: Positive = 1
    """Videos of each prompt."""
    batch_size: Positive = 1
    """Videos made at once; changes the time and memory that they take, and nothing else."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of transformer and text encoder; the VAE stays in fp32."""


@dataclass(frozen=True)
class CallSettings:
    """The pipeline's own arguments, its defaults filled in."""

    num_inference_steps: int
    guidance_scale: float
    num_frames: int
    height: int
    width: int
    max_sequence_length: int


def resolve(settings: GenerationSettings) -> tuple[Policy, CallSettings]:
    """The policy's description (no weights) and the call's settings, checked against it."""
    policy = load_policy(settings.policy, max_sequence_length=1, components=())
    index = json.loads((policy.folder / "model_index.json").read_text())
    given = asdict(settings) | {"num_inference_steps": settings.num_steps}
    defaults = pipeline_defaults(index["_class_name"])
    limit = tokenizer_limit(policy.folder)
    if limit is not None:
        defaults["max_sequence_length"] = min(defaults["max_sequence_length"], limit)
    names = [field.name for field in fields(CallSettings)]
    call = CallSettings(**{name: defaults[name] if given[name] is None else given[name] for name in names})
    if call.guidance_scale < 1 or not settings.fps > 0:
        raise GenerationError(
            f"guidance_scale is {call.guidance_scale} and fps is {settings.fps}; they must be 1 or more, and above 0"
        )
    if settings.lora is not None and not (settings.lora.is_file() and settings.lora.suffix == ".safetensors"):
        raise GenerationError(f"lora {str(settings.lora)!r} is not a .safetensors file that exists")
    try:
        policy.latent_shape(VideoConfig(call.num_frames, call.height, call.width, settings.fps))
    except ValueError as error:
        raise GenerationError(str(error).replace("video.", "")) from None
    return policy, call


def pipeline_defaults(class_name: str) -> dict[str, Any]:
    """What a diffusers pipeline's call takes where it is told nothing."""
    parameters = inspect.signature(getattr(diffusers, class_name).__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def tokenizer_limit(folder: Path) -> int | None:
    """`model_max_length` of the folder's tokenizer; None where it states none."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    limit = json.loads(file.read_text()).get("model_max_length") if file.is_file() else None
    return None if limit is None else int(limit)
