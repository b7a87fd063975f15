"""Wan text-to-video and image-to-video: 2.1 (arXiv 2503.20314) and 2.2.

14B policies of Wan 2.2 have two experts, `transformer` at high noise and `transformer_2` at low noise. The 5B policy of
2.2 takes a timestep for each token. Without an image all are equal, so one for each sample is passed: the same function
with a smaller modulation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.attention import SequencePlan, split_rope
from bpgo_video.policies.base import Arguments, Images, LatentShape, Policy, Shapes
from bpgo_video.policies.networks import read_index, transformer_names
from bpgo_video.types import Conditioning, Latents

TEXT_BESIDE_IMAGES = 512  # tokens: diffusers' attention takes all tokens before the last 512 for the image's
CLIP_TOKENS = 257  # of CLIP ViT-H at 224 pixels, the image encoder of Wan 2.1
ORIGINAL_NAMES = {  # diffusers' name -> the name in github.com/Wan-Video and ComfyUI
    r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"condition_embedder\.image_embedder\.norm1": "img_emb.proj.0",
    r"condition_embedder\.image_embedder\.norm2": "img_emb.proj.4",
    r"condition_embedder\.image_embedder\.pos_embed": "img_emb.emb_pos",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"^proj_out": "head.head",
    r"^scale_shift_table": "head.modulation",
    r"\.scale_shift_table": ".modulation",
    r"^(blocks\.\d+)\.norm2": r"\1.norm3",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0$": ".o",
    r"\.to_([qkv])$": r".\1",
    r"\.add_([kv])_proj$": r".\1_img",
    r"\.norm_added_k$": ".norm_k_img",
    r"\.ffn\.net\.0\.proj$": ".ffn.0",
    r"\.ffn\.net\.2$": ".ffn.2",
}


def original_name(name: str) -> str:
    """The original name of a layer or tensor of diffusers' Wan transformer."""
    layer, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        layer, dot, kind = name, "", ""
    for pattern, replacement in ORIGINAL_NAMES.items():
        layer = re.sub(pattern, replacement, layer)
    return layer + dot + kind


class WanPolicy(Policy):
    """Wan text-to-video."""

    pipeline_name = "WanPipeline"
    block_names: ClassVar[tuple[str, ...]] = ("WanTransformerBlock",)
    fps = 16.0
    sequence_plan = SequencePlan(blocks=("blocks",), rope=split_rope("rope", dim=1), head="proj_out")

    @classmethod
    def check(cls, folder: Path) -> None:
        super().check(folder)
        names, boundary = transformer_names(folder), read_index(folder).get("boundary_ratio")
        if (boundary is None) != (len(names) == 1):
            raise ConfigError(
                f"{folder} has {list(names)} and boundary_ratio {boundary}; two transformers need a boundary_ratio in "
                "model_index.json, and one transformer none"
            )

    def transformer_at(self, sigma: float) -> str:
        """The high-noise expert from the boundary on, compared in fp32 as in diffusers' pipeline."""
        boundary = getattr(self.pipeline.config, "boundary_ratio", None)  # SkyReels' pipelines have no such setting
        if boundary is None:
            return self.transformer_names[0]
        train_timesteps = self.pipeline.scheduler.config.num_train_timesteps
        is_high = torch.tensor(sigma, dtype=torch.float32) * train_timesteps >= boundary * train_timesteps
        return "transformer" if bool(is_high) else "transformer_2"

    def text_shapes(self, text_tokens: int) -> Shapes:
        return {"prompt_embeds": (text_tokens, self.transformer_config["text_dim"])}


class WanImagePolicy(WanPolicy):
    """Wan image-to-video, 14B.

    Further channels next to the noisy latents hold a mask of given frames and the latents of a video that is the image,
    then grey. Folders with a CLIP image encoder (2.1) also attend to its features.
    """

    pipeline_name = "WanImageToVideoPipeline"
    takes_images = True
    image_channels = True

    @classmethod
    def variant(cls, folder: Path) -> type[Policy]:
        return WanFirstFramePolicy if read_index(folder).get("expand_timesteps") else cls

    @property
    def _attends_to_images(self) -> bool:
        return self.transformer_config["added_kv_proj_dim"] is not None

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self._attends_to_images and self.max_sequence_length != TEXT_BESIDE_IMAGES:
            raise ConfigError(
                f"policy.max_sequence_length is {self.max_sequence_length}, but this transformer takes the last "
                f"{TEXT_BESIDE_IMAGES} tokens for text and those before for the image's; set it to {TEXT_BESIDE_IMAGES}"
            )
        return super().encode(texts)

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        return {"encoder_hidden_states_image": conditioning.get("image_embeds")}

    def text_shapes(self, text_tokens: int) -> Shapes:
        return super().text_shapes(TEXT_BESIDE_IMAGES if self._attends_to_images else text_tokens)

    def conditioning_shapes(self, latents: LatentShape, text_tokens: int) -> Shapes:
        config = self.transformer_config
        images: Shapes = {"image_latents": (config["in_channels"] - latents[0], *latents[1:])}
        if self._attends_to_images:
            images["image_embeds"] = (CLIP_TOKENS, config["image_dim"])
        return {**self.text_shapes(text_tokens), **images}

    @torch.no_grad()
    def image_conditioning(self, images: Images, video: VideoConfig) -> dict[str, Tensor]:
        """`image_latents`: `temporal stride` channels of the mask, then the latents; and CLIP's `image_embeds`."""
        latents = torch.cat([self._image_latents(image, video) for image in images.split(1)])
        if self.pipeline.image_encoder is None:
            return {"image_latents": latents}
        return {"image_latents": latents, "image_embeds": self._image_embeds(images)}

    def _image_latents(self, image: Float[Tensor, "1 3 height width"], video: VideoConfig) -> Tensor:
        frames = torch.full((1, video.num_frames, *image.shape[1:]), 0.5)
        frames[:, 0] = image
        latents = self.encode_video(frames)
        mask = latents.new_zeros(1, self.strides[0], *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)

    def _image_embeds(self, images: Images) -> Tensor:
        encoder = self.pipeline.image_encoder
        pictures = list((images * 255).round().to(torch.uint8).cpu().numpy())
        pixels = self.pipeline.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True).hidden_states[-2]


class WanFirstFramePolicy(WanPolicy):
    """Wan 2.2 5B image-to-video: the image is the first latent frame, clean and at timestep 0."""

    pipeline_name = "WanImageToVideoPipeline"
    takes_images = True
    given_frames = 1
    token_timesteps = True
