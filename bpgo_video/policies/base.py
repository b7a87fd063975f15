"""What is a policy? A video diffusion model that speaks rectified flow: x_sigma = (1 - sigma) data + sigma noise.

A family is one class behind this protocol. Everything else (samplers, replay, guidance, LoRA, sharding, export) works
through it and does not know the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.distributed.precision import finish_build, model_buffers, tensor_files
from bpgo_video.types import Conditioning, Guidance, Latents, Velocity, Videos

Build = Callable[[Any, Path, torch.dtype], nn.Module]  # (model class, its folder, dtype) -> the loaded module


def from_pretrained(model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The whole model on this process, for inference and for ZeRO 1 and 2.

    Raises:
        PrecisionError: a tensor has another dtype than `bpgo_video.distributed.precision` states.
    """
    model: nn.Module = model_class.from_pretrained(folder, torch_dtype=dtype)
    finish_build(model, model_buffers(model_class, folder, tensor_files(folder, model_class)), dtype)
    return model


@runtime_checkable
class Policy(Protocol):
    """Members that a family must have.

    Attributes:
        folder: the diffusers pipeline that it was loaded from.
        pipeline: diffusers' object with the parts that are loaded, its scheduler among them.
        pipeline_name: diffusers' class for it, which samples with the shipped scheduler.
        transformers: `Transformers`, those that are loaded; training puts the engine around them in their place.
        transformer_names: those of the folder, by their names in the pipeline.
        block_names: class names of the repeated blocks: ZeRO-3 fetches each block as one unit.
        max_sequence_length: text tokens; part of the policy's identity where padding is not masked.
        takes_images: its videos continue an image (image-to-video).
        texts_see_images: its text encoder reads a prompt together with the image.
        given_frames: latent frames at the start that the image fixes, and that are not sampled.
        padding_frames: latent frames that are sampled in front of the others, and that the video does not show.
        one_dtype: diffusers' pipeline runs in one dtype alone, its VAE included.
        one_text_a_call: texts beside each other in a call of diffusers' pipeline would change each other's videos.
        fps: frames a second that the family's authors train on.
        options: settings that are the family's own, by their names in a recipe's section policy.
        guidance_argument: what the pipeline's call names classifier-free guidance.
        sequence_plan: where its transformer parts its tokens; None takes the one of its class.
        transformer_inputs: what its transformer takes in, as shapes; None takes the function of its class.
    """

    folder: Path
    pipeline: Any
    pipeline_name: str
    transformers: Any
    transformer_names: tuple[str, ...]
    block_names: tuple[str, ...]
    max_sequence_length: int
    takes_images: bool
    texts_see_images: bool
    given_frames: int
    padding_frames: int
    one_dtype: bool
    one_text_a_call: bool
    fps: float
    options: Mapping[str, float | None]
    guidance_argument: str
    sequence_plan: Any
    transformer_inputs: Any

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of prompts, axis 0 over prompts; needs the text encoder.

        Where texts see images: of negative prompts, which have none.
        """
        ...

    def encode_with_images(
        self, texts: Sequence[str], images: Float[Tensor, "prompts 3 height width"]
    ) -> dict[str, Tensor]:
        """As `encode`, of prompts each with its own image in [0, 1]; for policies whose texts see images."""
        ...

    def image_conditioning(
        self, images: Float[Tensor, "prompts 3 height width"], video: VideoConfig
    ) -> dict[str, Tensor]:
        """What images in [0, 1] add to the conditioning, axis 0 over prompts; for policies that take images."""
        ...

    def video_conditioning(self, video: VideoConfig) -> dict[str, Tensor]:
        """What of the video itself the transformer is told, such as its frame rate: one row, in fp32."""
        ...

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        """(channels, latent_frames, latent_height, latent_width) of what is sampled, without the given frames.

        Raises:
            ConfigError: a size that the family cannot make.
        """
        ...

    def example(self) -> tuple[Latents, Conditioning]:
        """A small input of one sample for the transformer, always the same: to compare two sets of weights."""
        ...

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """The family's own noise levels for such a video: [num_steps + 1] in fp32, from 1 down to 0."""
        ...

    def start(self, noise: Latents, conditioning: Conditioning) -> Latents:
        """Latents at the first noise level, made of standard normal noise; most often the noise itself."""
        ...

    def transformer_at(self, sigma: float) -> str:
        """The name of the transformer that computes at a noise level."""
        ...

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        """noise - data as the policy sees it at noise level `sigma`, fp32; differentiable.

        Args:
            sigma: 0-dim, or one for each sample, all of one transformer; on the CPU.
        """
        ...

    def encode_video(self, videos: Videos) -> Latents:
        """Clean latents of pixels in [0, 1], without the given frames; the mode of the VAE's posterior; no gradient.

        `decode` is its inverse, but for what the VAE loses.
        """
        ...

    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        """Pixels in [0, 1] of clean latents, behind the frames that the conditioning gives; no gradient."""
        ...

    def call_defaults(self) -> dict[str, int]:
        """Size, text tokens and guidance by `CallSettings`' names, where they are not what the pipeline's call says."""
        ...

    def take_settings(self, pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a call as diffusers' pipeline takes them: what its call is given, the rest set on its parts.

        Args:
            pipeline: the one to be called.
            settings: `num_inference_steps`, `num_frames`, `height`, `width`, `guidance_scale`, `max_sequence_length`,
                and `guidance_scale_2` where there are two transformers.
        """
        ...

    def call_arguments(
        self,
        pipeline: Any,
        latents: Latents,
        video: VideoConfig,
        images: Float[Tensor, "samples 3 height width"] | None,
    ) -> dict[str, Any]:
        """What diffusers' pipeline takes beside prompt, image, size and guidance: the initial noise in its own layout.

        Args:
            pipeline: the one to be called, with all its networks.
            images: in [0, 1], where the policy takes them.
        """
        ...


def guided_velocity(policy: Policy, latents: Latents, sigma: Tensor, guidance: Guidance, scale: float) -> Velocity:
    """v = v_away + scale (v_towards - v_away): classifier-free guidance (arXiv 2207.12598).

    Both halves go through the transformer as one batch, so that ZeRO-3 gathers its parameters once. At scale 1 there is
    no second half.

    Raises:
        ValueError: there is nothing to guide away from.
    """
    if scale == 1.0:
        return policy.velocity(latents, sigma, guidance.towards)
    if not guidance.away:
        raise ValueError(f"guidance_scale is {scale}, but the prompts have no negative prompt; encode one, or set 1.0")
    both = {name: torch.cat([value, guidance.away.get(name, value)]) for name, value in guidance.towards.items()}
    prompted, unprompted = policy.velocity(torch.cat([latents, latents]), sigma, both).chunk(2)
    return unprompted + scale * (prompted - unprompted)
