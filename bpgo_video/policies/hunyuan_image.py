"""How does HunyuanVideo image-to-video (arXiv 2412.03603) fit the policy protocol? In one of two ways.

latent_concat: the image's latents and a mask of given frames are further channels of the noisy ones. The video's first
frames are sampled and not shown. token_replace: the image is the first latent frame, clean, at noise level 0, and only
the others are sampled.

Both read the image together with the text, and start from noise into which a thousandth of the image is mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.hunyuan import HunyuanVideoPolicy, image_condition_type
from bpgo_video.policies.pipeline_policy import PipelinePolicy
from bpgo_video.types import Conditioning, Latents, Videos

Images = Float[Tensor, "prompts 3 height width"]

TEMPLATE: dict[str, Any] = DEFAULT_PROMPT_TEMPLATE
IMAGE_TOKENS = int(TEMPLATE["image_emb_len"])  # LLaVA's states of an image
MIXED = 0.001  # of the image in the first latents
NEGATIVE_STRIDE = 2  # the pipeline's `image_embed_interleave` of negative prompts, whatever that of prompts is
PIPELINE_FRAMES = 129  # what its call takes by default, those that are not shown among them


class HunyuanImagePolicy(HunyuanVideoPolicy):
    """What both ways share.

    Attributes:
        image_stride: the transformer is told one in so many of LLaVA's states of the image.
    """

    pipeline_name = "HunyuanVideoImageToVideoPipeline"
    takes_images = True
    texts_see_images = True
    options = MappingProxyType({"embedded_guidance": 1.0})
    image_condition_types = ("latent_concat", "token_replace")
    image_stride: ClassVar[int]

    @classmethod
    def variant(cls, folder: Path) -> type[PipelinePolicy]:
        return VARIANTS[image_condition_type(folder)]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Of negative prompts: the pipeline shows a black image beside them."""
        return self._encode(texts, [Image.new("RGB", (16, 16))] * len(texts), NEGATIVE_STRIDE)

    @torch.no_grad()
    def encode_with_images(self, texts: Sequence[str], images: Images) -> dict[str, Tensor]:
        """LLaVA's states of the image and of the text in the pipeline's template, with their mask, and CLIP's."""
        pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
        return self._encode(texts, pictures, self.image_stride)

    def _encode(self, texts: Sequence[str], pictures: Sequence[Image.Image], stride: int) -> dict[str, Tensor]:
        found = [self._encode_one(text, picture, stride) for text, picture in zip(texts, pictures, strict=True)]
        names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
        return {name: torch.cat(rows) for name, rows in zip(names, zip(*found, strict=True), strict=True)}

    def _encode_one(self, text: str, picture: Image.Image, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Alone: the pipeline finds the end of a text that is too long only where it is the batch's only one.

        All have as many rows, so that a prompt and its negative prompt can share a batch; what is added is masked.
        """
        embeddings, pooled, mask = self.pipeline.encode_prompt(
            image=picture, prompt=[text], max_sequence_length=self.max_sequence_length, image_embed_interleave=stride
        )
        missing = IMAGE_TOKENS // NEGATIVE_STRIDE - IMAGE_TOKENS // stride
        return pad(embeddings, (0, 0, 0, missing)), pad(mask.bool(), (0, missing)), pooled

    @torch.no_grad()
    def image_conditioning(self, images: Images, video: VideoConfig) -> dict[str, Tensor]:
        """`image_latents`: a latent frame, [prompts, channels, 1, latent_height, latent_width]."""
        vae = self.pipeline.vae
        return {"image_latents": torch.cat([self.clean_latents(vae, image[None, None]) for image in images])}

    def start(self, noise: Latents, conditioning: Conditioning) -> Latents:
        """The noise with a thousandth of the image in every frame; the noise level counts as 1 nonetheless."""
        return (1 - MIXED) * noise + MIXED * conditioning["image_latents"].to(noise)

    def example(self) -> tuple[Latents, Conditioning]:
        latents, conditioning = super().example()
        image = torch.randn(latents[:, :, :1].shape, generator=torch.Generator().manual_seed(1))
        return latents, {**conditioning, "image_latents": image}


class HunyuanConcatPolicy(HunyuanImagePolicy):
    """latent_concat: the image is told in further channels; a latent frame is sampled in front and not shown."""

    image_stride = 2
    padding_frames = 1

    @property
    def hidden_frames(self) -> int:
        """Video frames that the VAE decodes of the latent frame in front, and that are not shown."""
        return self.padding_frames * int(self.vae_config["temporal_compression_ratio"])

    def call_defaults(self) -> dict[str, int]:
        return {"num_frames": PIPELINE_FRAMES - self.hidden_frames}

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        channels, frames, height, width = super().latent_shape(video)
        return channels, frames + self.padding_frames, height, width

    def transformer_input(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        image = conditioning["image_latents"].to(latents)
        given = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
        return torch.cat([latents, pad(given, (0, 0, 0, 0, 0, latents.shape[2] - 1))], dim=1)

    @torch.no_grad()
    def encode_video(self, videos: Videos) -> Latents:
        """In the frames that are not shown the first one stands still."""
        still = videos[:, :1].expand(-1, self.hidden_frames, -1, -1, -1)
        return super().encode_video(torch.cat([still, videos], dim=1))

    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        return super().decode(latents, conditioning)[:, self.hidden_frames :]

    def call_arguments(
        self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None
    ) -> dict[str, Any]:
        """The pipeline counts the frames that it does not show."""
        arguments = super().call_arguments(pipeline, latents, video, images)
        return {**arguments, "num_frames": video.num_frames + self.hidden_frames}


class HunyuanFirstFramePolicy(HunyuanImagePolicy):
    """token_replace: the image is the first latent frame, and the transformer gives its tokens the noise level 0."""

    block_names = ("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock")
    image_stride = 4
    given_frames = 1

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        channels, frames, height, width = super().latent_shape(video)
        if frames == self.given_frames:
            raise ConfigError(
                f"video.num_frames is {video.num_frames}, and the image is the first of them: nothing would be "
                f"sampled; take {1 + self.vae_config['temporal_compression_ratio']} or more"
            )
        return channels, frames - self.given_frames, height, width

    def encode_video(self, videos: Videos) -> Latents:
        return super().encode_video(videos)[:, :, self.given_frames :]

    def transformer_input(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        return torch.cat([conditioning["image_latents"].to(latents), latents], dim=2)

    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        return super().decode(self.transformer_input(latents, conditioning), conditioning)

    def call_arguments(
        self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None
    ) -> dict[str, Any]:
        """The pipeline replaces the first frame of the noise by the image's."""
        whole = torch.cat([torch.zeros_like(latents[:, :, : self.given_frames]), latents], dim=2)
        return super().call_arguments(pipeline, whole, video, images)


VARIANTS: dict[str | None, type[PipelinePolicy]] = {  # image_condition_type of the transformer's config -> its policy
    "latent_concat": HunyuanConcatPolicy,
    "token_replace": HunyuanFirstFramePolicy,
}
