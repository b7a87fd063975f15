"""HunyuanVideo text-to-video and image-to-video (arXiv 2412.03603).

The transformer is distilled: it takes a guidance scale, `policy.embedded_guidance`, and returns a guided velocity in
one pass. Classifier-free guidance (`sampler.guidance_scale`) is independent of it and comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.distributed.ulysses import Ulysses
from bpgo_video.policies.attention import SequencePlan, split_rope
from bpgo_video.policies.base import (
    AllFrames,
    Arguments,
    Images,
    LatentShape,
    Policy,
    Shapes,
    given_first,
)
from bpgo_video.policies.networks import class_of
from bpgo_video.policies.schedule import scheduled_sigmas
from bpgo_video.types import Conditioning, Latents, Videos
from bpgo_video.weights import read_config

GUIDANCE_UNIT = 1000.0  # of the transformer's guidance input
GIVEN_TOKENS = 6  # position, among a block's arguments, of the number of first tokens that are given
TEMPLATE: dict[str, Any] = DEFAULT_PROMPT_TEMPLATE
IMAGE_TOKENS = int(TEMPLATE["image_emb_len"])  # LLaVA's states of an image
CUT_TOKENS = 4  # of the text, cut by the image-to-video pipeline
MIXED = 0.001  # weight of the image in the first latents
NEGATIVE_STRIDE = 2  # the pipeline's `image_embed_interleave` for negative prompts, whatever it is for prompts
PIPELINE_FRAMES = 129  # the pipeline call's default, hidden frames included


def split_tokens(transformer: nn.Module, ulysses: Ulysses) -> None:
    """Split rotary embeddings, and the number of given tokens among a rank's own, which blocks take as an argument."""

    def count_given(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[:GIVEN_TOKENS], ulysses.held(args[GIVEN_TOKENS]), *args[GIVEN_TOKENS + 1 :])

    split_rope("rope", dim=0)(transformer, ulysses)
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in transformer.get_submodule(name).children():
            block.register_forward_pre_hook(count_given)


class HunyuanVideoPolicy(Policy):
    """HunyuanVideo text-to-video."""

    pipeline_name = "HunyuanVideoPipeline"
    block_names = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    fps = 24.0
    options = MappingProxyType({"embedded_guidance": 6.0})
    guidance_argument = "true_cfg_scale"
    required_settings = MappingProxyType({"transformer": {"image_condition_type": (None,)}})
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks", "single_transformer_blocks"), rope=split_tokens, head="proj_out"
    )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """LLaMA's states of the text in the pipeline's template, their mask, and CLIP's pooled states."""
        embeddings, pooled, mask = self.pipeline.encode_prompt(
            list(texts), max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask.bool(), "pooled_prompt_embeds": pooled}

    def text_shapes(self, text_tokens: int) -> Shapes:
        config = self.transformer_config
        return {
            "prompt_embeds": (text_tokens, config["text_embed_dim"]),
            "prompt_attention_mask": (text_tokens,),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        levels = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
        return scheduled_sigmas(self.pipeline.scheduler, levels.tolist(), shift)

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        guidance = conditioning["prompt_embeds"].new_full((len(latents),), self.embedded_guidance) * GUIDANCE_UNIT
        return {
            "encoder_attention_mask": conditioning["prompt_attention_mask"],
            "pooled_projections": conditioning["pooled_prompt_embeds"],
            "guidance": guidance if self.transformer_config["guidance_embeds"] else None,
        }

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """The noise, and the embedded guidance, which the pipeline's call names guidance_scale."""
        arguments = super().call_arguments(pipeline, latents, video, images)
        return {**arguments, "guidance_scale": self.embedded_guidance}


class HunyuanImagePolicy(HunyuanVideoPolicy):
    """HunyuanVideo image-to-video: LLaVA reads the image with the text, and sampling starts from 0.1 % of the image.

    Attributes:
        image_stride: the transformer takes every so-many-th of LLaVA's states of the image.
    """

    pipeline_name = "HunyuanVideoImageToVideoPipeline"
    takes_images = True
    texts_see_images = True
    options = MappingProxyType({"embedded_guidance": 1.0})
    required_settings = MappingProxyType({"transformer": {"image_condition_type": ("latent_concat", "token_replace")}})
    image_stride: ClassVar[int]

    @classmethod
    def variant(cls, folder: Path) -> type[Policy]:
        kind = read_config(folder / "transformer", class_of(folder, "transformer"))["image_condition_type"]
        return HunyuanConcatPolicy if kind == "latent_concat" else HunyuanFirstFramePolicy

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Negative prompts: the pipeline pairs them with a black image."""
        return self._encode(texts, [Image.new("RGB", (16, 16))] * len(texts), NEGATIVE_STRIDE)

    @torch.no_grad()
    def encode_with_images(self, texts: Sequence[str], images: Images) -> dict[str, Tensor]:
        """LLaVA's states of image and text in the pipeline's template, their mask, and CLIP's pooled states."""
        pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
        return self._encode(texts, pictures, self.image_stride)

    def _encode(self, texts: Sequence[str], pictures: Sequence[Image.Image], stride: int) -> dict[str, Tensor]:
        rows = [self._encode_one(text, picture, stride) for text, picture in zip(texts, pictures, strict=True)]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _encode_one(self, text: str, picture: Image.Image, stride: int) -> dict[str, Tensor]:
        """One text: in a batch the pipeline does not find where a text that is too long ends.

        Masked rows are appended up to one length, so that a prompt and its negative prompt fit in one batch.
        """
        embeddings, pooled, mask = self.pipeline.encode_prompt(
            image=picture, prompt=[text], max_sequence_length=self.max_sequence_length, image_embed_interleave=stride
        )
        missing = IMAGE_TOKENS // NEGATIVE_STRIDE - IMAGE_TOKENS // stride
        return {
            "prompt_embeds": pad(embeddings, (0, 0, 0, missing)),
            "prompt_attention_mask": pad(mask.bool(), (0, missing)),
            "pooled_prompt_embeds": pooled,
        }

    def text_shapes(self, text_tokens: int) -> Shapes:
        return super().text_shapes(text_tokens + IMAGE_TOKENS // NEGATIVE_STRIDE - CUT_TOKENS)

    def start(self, noise: Latents, conditioning: Conditioning) -> Latents:
        """Noise with 0.1 % of the image in every frame; its noise level still counts as 1."""
        return (1 - MIXED) * noise + MIXED * conditioning["image_latents"].to(noise)


class HunyuanConcatPolicy(HunyuanImagePolicy):
    """latent_concat: further channels hold the image's latents and a mask of given frames.

    A latent frame is sampled before the video's own and not shown.
    """

    image_stride = 2
    padding_frames = 1

    @property
    def hidden_frames(self) -> int:
        """Video frames that the VAE decodes from the padding frame; they are not shown."""
        return self.padding_frames * self.strides[0]

    def call_defaults(self) -> dict[str, int]:
        return {"num_frames": PIPELINE_FRAMES - self.hidden_frames}

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        channels, frames, height, width = super().latent_shape(video)
        return channels, frames + self.padding_frames, height, width

    def hidden_states(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        given = given_first(conditioning["image_latents"].to(latents), latents.shape[2])
        return torch.cat([latents, given], dim=1)

    @torch.no_grad()
    def encode_video(self, videos: Videos) -> Latents:
        """The first frame is repeated for the hidden frames."""
        still = videos[:, :1].expand(-1, self.hidden_frames, -1, -1, -1)
        return super().encode_video(torch.cat([still, videos], dim=1))

    def decode_frames(self, latents: AllFrames) -> Videos:
        return super().decode_frames(latents)[:, self.hidden_frames :]

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """The pipeline's num_frames includes hidden frames."""
        arguments = super().call_arguments(pipeline, latents, video, images)
        return {**arguments, "num_frames": video.num_frames + self.hidden_frames}


class HunyuanFirstFramePolicy(HunyuanImagePolicy):
    """token_replace: the image is the first latent frame, and the transformer sets the timestep of its tokens to 0."""

    block_names = ("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock")
    image_stride = 4
    given_frames = 1
