"""HunyuanVideo 1.5 text-to-video and image-to-video (arXiv 2511.18870).

Further channels next to the noisy latents hold an image's latents and a mask of given frames, and further tokens hold
the image's features. Without an image the channels are zeros and the tokens are masked. Texts are states of Qwen2.5-VL;
ByT5 reads what stands between quotation marks, for the letters in the video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.attention import JointAttention, Rotary, SequencePlan, replace_processors, split_rope
from bpgo_video.policies.base import Arguments, Images, LatentShape, Policy, Shapes, given_first
from bpgo_video.policies.networks import class_of, read_index
from bpgo_video.policies.schedule import scheduled_sigmas
from bpgo_video.types import Conditioning, Latents
from bpgo_video.weights import read_config

GUIDER = "ClassifierFreeGuidance"
ASPECT = (9, 16)  # height to width of a video whose size is left out
GLYPH_TOKENS = 256  # of ByT5
SIGLIP_TOKENS = 729  # of SigLIP at 384 pixels


def rotated(x: Float[Tensor, "samples tokens heads head_dim"], rotary: Rotary) -> Tensor:
    """Turned by the angles of their token, the same for every head."""
    return cast(Tensor, apply_rotary_emb(x, cast(Any, rotary), sequence_dim=1))  # annotated as something else


# Attention with a mask of keys.
mask_keys = partial(replace_processors, attention="attn", processor=partial(JointAttention, rotated))


class HunyuanVideo15Policy(Policy):
    """HunyuanVideo 1.5 text-to-video."""

    pipeline_name = "HunyuanVideo15Pipeline"
    block_names = ("HunyuanVideo15TransformerBlock",)
    fps = 24.0
    slices_vae = True
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks",), rope=split_rope("rope", dim=0), head="proj_out", attention=mask_keys
    )
    required_settings = MappingProxyType(
        {
            "transformer": {"use_meanflow": (False,)},  # meanflow predicts the average velocity of a step
            "guider": {  # the guidance that a rollout computes, the same in all steps
                "guidance_rescale": (0.0,),
                "use_original_formulation": (False,),
                "start": (0.0,),
                "stop": (1.0,),
            },
        }
    )

    @classmethod
    def check(cls, folder: Path) -> None:
        guider = read_index(folder).get("guider") or [None, None]
        if guider[1] != GUIDER:
            raise ConfigError(f"{folder} has the guider {guider[1]!r}; this family samples only with {GUIDER!r}")
        super().check(folder)

    @classmethod
    def assemble(cls, folder: Path, parts: Mapping[str, nn.Module | None]) -> Any:
        """The pipeline reads its VAE's settings when it is made: if none is loaded, a VAE on the meta device helps."""
        if parts["vae"] is not None:
            return super().assemble(folder, parts)
        vae_class = class_of(folder, "vae")
        with torch.device("meta"):
            shapes = vae_class.from_config(read_config(folder / "vae", vae_class))
        pipeline = super().assemble(folder, {**parts, "vae": shapes})
        pipeline.register_modules(vae=None)
        return pipeline

    def prepare(self, transformer: Any) -> None:
        mask_keys(transformer)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` of Qwen2.5-VL, `prompt_embeds_2` of ByT5, and the masks of their real tokens."""
        self.pipeline.tokenizer_max_length = self.max_sequence_length
        embeds, mask, embeds_2, mask_2 = self.pipeline.encode_prompt(list(texts), batch_size=len(texts))
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask.bool(),
            "prompt_embeds_2": embeds_2,
            "prompt_embeds_mask_2": mask_2.bool(),
        }

    def text_shapes(self, text_tokens: int) -> Shapes:
        config = self.transformer_config
        return {
            "prompt_embeds": (text_tokens, config["text_embed_dim"]),
            "prompt_embeds_mask": (text_tokens,),
            "prompt_embeds_2": (GLYPH_TOKENS, config["text_embed_2_dim"]),
            "prompt_embeds_mask_2": (GLYPH_TOKENS,),
        }

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        levels = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
        return scheduled_sigmas(self.pipeline.scheduler, levels.tolist(), shift)

    def hidden_states(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        dtype = conditioning["prompt_embeds"].dtype
        return torch.cat([latents.to(dtype), self.given_channels(latents, conditioning).to(dtype)], dim=1)

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        texts = conditioning["prompt_embeds"]
        return {
            "timestep": self.timesteps(latents, sigma).to(texts.dtype),  # its embedding is computed in this dtype
            "encoder_attention_mask": conditioning["prompt_embeds_mask"],
            "encoder_hidden_states_2": conditioning["prompt_embeds_2"],
            "encoder_attention_mask_2": conditioning["prompt_embeds_mask_2"],
            "image_embeds": self.image_features(conditioning),
        }

    def given_channels(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        """Clean latents of given frames, and last their mask: zeros, since there are none."""
        samples, channels, *size = latents.shape
        return latents.new_zeros(samples, self.transformer_config["in_channels"] - channels, *size)

    def image_features(self, conditioning: Conditioning) -> Tensor:
        """[samples, image_tokens, image_dim]: zeros, which the transformer takes to mean that there is no image.

        It masks all these tokens, so one gives the same result as the pipeline's 729.
        """
        texts = conditioning["prompt_embeds"]
        return texts.new_zeros(len(texts), 1, self.transformer_config["image_embed_dim"])

    def bucket(self, height: int, width: int) -> tuple[int, int]:
        """The height and width, among those of the folder's resolution, at which the pipeline makes such a picture."""
        processor = HunyuanVideo15ImageProcessor(vae_scale_factor=self.strides[1])
        sides = processor.calculate_default_height_width(height, width, self.transformer_config["target_size"])
        return int(sides[0]), int(sides[1])

    def call_defaults(self) -> dict[str, Any]:
        """A wide video of the folder's resolution, the pipeline's text tokens and its guider's scale."""
        guider = self.pipeline.guider.config
        return {
            **self.default_size(),
            "max_sequence_length": self.pipeline.tokenizer_max_length,
            "guidance_scale": guider.guidance_scale if guider.enabled else 1.0,
        }

    def default_size(self) -> dict[str, int]:
        height, width = self.bucket(*ASPECT)
        return {"height": height, "width": width}

    def take_settings(self, pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The guider holds the guidance scale, and the pipeline the number of text tokens."""
        others = dict(settings)
        pipeline.vae.enable_slicing()
        pipeline.guider.enable()
        pipeline.guider.guidance_scale = others.pop("guidance_scale")
        pipeline.tokenizer_max_length = others.pop("max_sequence_length")
        return others


class HunyuanVideo15ImagePolicy(HunyuanVideo15Policy):
    """HunyuanVideo 1.5 image-to-video: the image is the first frame, and SigLIP's features are further tokens.

    The pipeline takes the size of the video from the image, among the sizes of its resolution.
    """

    pipeline_name = "HunyuanVideo15ImageToVideoPipeline"
    takes_images = True

    def bucket(self, height: int, width: int) -> tuple[int, int]:
        """A fixed point of the pipeline's rounding: some rounded sizes would fall into the next bucket."""
        sides = super().bucket(height, width)
        return sides if sides == (height, width) else self.bucket(*sides)

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        height, width = self.bucket(video.height, video.width)
        if (height, width) != (video.height, video.width):
            raise ConfigError(
                f"video.height is {video.height} and video.width {video.width}; from an image of this shape the "
                f"pipeline makes {height} x {width}: set video.height to {height} and video.width to {width}"
            )
        return super().latent_shape(video)

    def take_settings(self, pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The image sets the size."""
        taken = super().take_settings(pipeline, settings)
        return {name: value for name, value in taken.items() if name not in ("height", "width")}

    def conditioning_shapes(self, latents: LatentShape, text_tokens: int) -> Shapes:
        image_embeds = (SIGLIP_TOKENS, self.transformer_config["image_embed_dim"])
        return {**super().conditioning_shapes(latents, text_tokens), "image_embeds": image_embeds}

    @torch.no_grad()
    def image_conditioning(self, images: Images, video: VideoConfig) -> dict[str, Tensor]:
        """`image_latents`, [prompts, channels, 1, latent_height, latent_width], and `image_embeds` of SigLIP."""
        eight_bit = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        encoder = self.pipeline.image_encoder
        embeds = self.pipeline._get_image_embeds(
            encoder, self.pipeline.feature_extractor, [Image.fromarray(pixels) for pixels in eight_bit], encoder.device
        )
        return {**super().image_conditioning(images, video), "image_embeds": embeds}

    def given_channels(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        """The image's latents and ones in the first frame, zeros after it."""
        return given_first(conditioning["image_latents"], latents.shape[2])

    def image_features(self, conditioning: Conditioning) -> Tensor:
        """SigLIP's features."""
        return conditioning["image_embeds"]
