"""Wan VACE (arXiv 2503.07598): text-to-video under a control video, a reference image, or both.

A second stack of blocks takes 2 z + s^2 channels for each latent frame: the latents of what is kept and of what is made
anew, and a mask of the s x s pixels of each latent pixel. As in diffusers' pipeline without a mask, the whole video is
made anew: the mask is 1, and what is kept is grey. A reference image is a latent frame before those of the video, with
mask 0. A latent frame is sampled for it, which is not shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.distributed.ulysses import Ulysses
from bpgo_video.policies.attention import SequencePlan, split_rope
from bpgo_video.policies.base import AllFrames, Arguments, Images, LatentShape, Shapes
from bpgo_video.policies.wan import WanPolicy
from bpgo_video.types import Conditioning, Latents, Videos

GREY = 0.5  # 0 in the VAE's range


def split_both_stacks(transformer: Any, ulysses: Ulysses) -> None:
    """Split rotary embeddings, the control tokens that enter the second stack, and the video's that enter the first.

    The plan's own hook splits the video's tokens where they enter the second stack, which runs first.
    """

    def split_control(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, texts, control, *others = args
        return hidden_states, texts, ulysses.split(control, 1), *others

    def split_video(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return ulysses.split(args[0], 1), *args[1:]

    split_rope("rope", dim=1)(transformer, ulysses)
    transformer.vace_blocks[0].register_forward_pre_hook(split_control)
    transformer.blocks[0].register_forward_pre_hook(split_video)


class VACEPolicy(WanPolicy):
    """What the kinds of control share."""

    pipeline_name = "WanVACEPipeline"
    block_names = ("WanTransformerBlock", "WanVACETransformerBlock")
    one_video_a_call = True
    image_argument = "reference_images"
    sequence_plan = SequencePlan(blocks=("vace_blocks", "blocks"), rope=split_both_stacks, head="proj_out")

    def __init__(self, folder: Path, pipeline: Any, max_sequence_length: int):
        super().__init__(folder, pipeline, max_sequence_length)
        self._grey: dict[VideoConfig, AllFrames] = {}

    def grey(self, video: VideoConfig) -> AllFrames:
        """The latents of a grey video, encoded once."""
        if video not in self._grey:
            pixels = torch.full((1, video.num_frames, 3, video.height, video.width), GREY)
            self._grey[video] = self.clean_latents(self.pipeline.vae, pixels)
        return self._grey[video]

    def conditioning_shapes(self, latents: LatentShape, text_tokens: int) -> Shapes:
        control = (self.transformer_config["vace_in_channels"], *latents[1:])
        return {**self.text_shapes(text_tokens), "control_latents": control}

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        return {"control_hidden_states": conditioning["control_latents"].to(conditioning["prompt_embeds"].dtype)}

    def controls(self, videos: Videos | None, images: Images | None, video: VideoConfig) -> dict[str, Tensor]:
        """`control_latents` of one prompt: [1, 2 z + s^2, latent_frames, latent_height, latent_width].

        Args:
            videos: the control video; None is grey.
            images: the reference image, if any.
        """
        vae, grey = self.pipeline.vae, self.grey(video)
        made = grey if videos is None else self.clean_latents(vae, videos)
        mask = made.new_ones(1, self.strides[1] ** 2, *made.shape[2:])
        control = torch.cat([grey, made, mask], dim=1)
        if images is not None:
            image = self.clean_latents(vae, images[:, None])
            unmasked = torch.cat([torch.zeros_like(image), torch.zeros_like(mask[:, :, :1])], dim=1)
            control = torch.cat([torch.cat([image, unmasked], dim=1), control], dim=2)
        return {"control_latents": control}

    def encode_video(self, videos: Videos) -> Latents:
        """Refused: a clip names no control.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{type(self).__name__} cannot be trained on clips, which name no control; train on rewards")


class ControlVideoPolicy(VACEPolicy):
    """A control video, such as depth or poses, decides the motion."""

    takes_videos = True

    @torch.no_grad()
    def control_conditioning(self, videos: Videos, images: Images | None, video: VideoConfig) -> dict[str, Tensor]:
        return self.controls(videos, images, video)


class ReferenceImagePolicy(VACEPolicy):
    """A reference image decides what the video shows."""

    takes_images = True
    padding_frames = 1

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        channels, frames, height, width = super().latent_shape(video)
        return channels, frames + self.padding_frames, height, width

    @torch.no_grad()
    def image_conditioning(self, images: Images, video: VideoConfig) -> dict[str, Tensor]:
        rows = [self.controls(None, image, video)["control_latents"] for image in images.split(1)]
        return {"control_latents": torch.cat(rows)}

    def decode_frames(self, latents: AllFrames) -> Videos:
        return super().decode_frames(latents[:, :, self.padding_frames :])


class ControlVideoAndImagePolicy(ReferenceImagePolicy, ControlVideoPolicy):
    """A control video and a reference image."""
