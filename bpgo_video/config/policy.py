"""Sections of recipes: the policy, its adapters, and the videos that it makes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bpgo_video.config.fields import HELD, AboveZero, Count, Held, NonNegative, Positive, Share, Switch, Unit, section

FAMILY_OPTIONS = ("embedded_guidance", "decode_timestep", "decode_noise_scale")


def options_of(settings: object) -> dict[str, float]:
    """The FAMILY_OPTIONS that are set in a recipe's `policy` or in a generation's settings."""
    values = {name: getattr(settings, name) for name in FAMILY_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


@section
class LoraConfig:
    rank: Annotated[Count, Field(le=HELD)] = 0
    """Rank of the adapters; 0 trains all weights and uses no adapters."""
    alpha: Positive = 32
    """The adapters' output is multiplied by alpha/rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the transformer's linear layers that get adapters."""


@section
class PolicyConfig:
    folder: str
    """A diffusers pipeline: local folder, hub id, or `package:module/folder`."""
    max_sequence_length: Held
    """Text tokens. Wan pads without a mask, so its output depends on this (512 for Wan2.1)."""
    family: str | None = None
    """Policy class; None takes what the folder's model_index.json names. Give another pipeline of the same weights by
    diffusers' name (WanImageToVideoPipeline), or your own class as 'my_pkg.module:Name' (docs/new_family.md)."""
    trained: tuple[str, ...] = ()
    """Transformers to train if a pipeline has several (Wan 2.2: `transformer` at high noise, `transformer_2` at low);
    empty trains all. The denoising steps of the others follow the ODE."""
    lora: LoraConfig = LoraConfig()
    """Train adapters and keep the base weights frozen, or train all weights (rank 0, the default)."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the replay: less memory, about a third more time."""
    checkpointed_share: Share = 1.0
    """Share of the transformer's blocks that `gradient_checkpointing` computes again, evenly spread over its depth. The
    others keep their activations; `bpgo-video plan` names the smallest share that fits."""
    compile_blocks: Switch = False
    """Compile the transformers' repeated blocks with torch.compile."""
    attention_backend: str | None = None
    """Attention implementation, by diffusers' names (`native`, `_native_cudnn`, `flash`, `_flash_3` ...); None takes
    diffusers' default, torch's scaled_dot_product_attention. A backend without gradients cannot train."""
    vae_tiling: Switch = False
    """Encode and decode videos in overlapping tiles: much less memory, more time; tiles are blended where they meet."""
    vae_slicing: Switch = False
    """Encode and decode one video at a time: the memory of one, whatever the micro-batch."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the VAE decodes videos and encodes images. `bfloat16` takes half of the memory and less time,
    but changes pixels, and with them rewards. Video shards and generation stay in float32."""
    frozen_rest_on: Literal["device", "cpu"] = "device"
    """Where the VAE and the image encoder are while unused: `cpu` frees their memory, and copies them to the device and
    back for every micro-batch."""
    embedded_guidance: NonNegative | None = None
    """HunyuanVideo and FLUX.1: guidance input of a distilled transformer, in one pass; None takes the pipeline's 6 or
    3.5. It is independent of classifier-free guidance, `sampler.guidance_scale`."""
    decode_timestep: Unit | None = None
    """LTX-Video from 0.9.1 on: noise level at which its VAE, which removes remaining noise, decodes. None takes the
    pipeline's 0; diffusers' documentation recommends 0.05."""
    decode_noise_scale: Unit | None = None
    """LTX-Video: amount of noise added before decoding; None takes decode_timestep."""

    @property
    def checkpointed(self) -> float:
        """Share of the blocks that the backward computes again."""
        return self.checkpointed_share if self.gradient_checkpointing else 0.0

    @property
    def options(self) -> dict[str, float]:
        """The FAMILY_OPTIONS that are set."""
        return options_of(self)


@section
class VideoConfig:
    num_frames: Held
    """Frames of a video; a number that the policy's VAE can make, such as 4 n + 1 for Wan."""
    height: Held
    """Pixels."""
    width: Held
    """Pixels."""
    fps: AboveZero
    """Frames per second, for rewards and files."""
