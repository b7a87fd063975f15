"""How does HunyuanVideo 1.5 text-to-video (arXiv 2511.18870) fit the policy protocol?

Beside the noisy latents its transformer sees an image's latents and a mask of given frames as further channels, and an
image's features as further tokens; without an image they are zeros, and the tokens are masked. Texts are states of
Qwen2.5-VL, and what stands between quotation marks is spelled to ByT5, for the letters in the video.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.flow_match import scheduled_sigmas
from bpgo_video.policies.hunyuan15_attention import dispatch
from bpgo_video.policies.hunyuan_vae import HunyuanVAEPolicy
from bpgo_video.policies.pipeline_policy import networks_of, read_config
from bpgo_video.policies.transformers import read_index, transformer_names
from bpgo_video.types import Conditioning, Latents, Velocity

GUIDER = "ClassifierFreeGuidance"
PLAIN_GUIDANCE = MappingProxyType(  # what the rollout computes, and the guider's own defaults
    {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
)
ASPECT = (9, 16)  # height to width, of videos whose size is left out


class HunyuanVideo15Policy(HunyuanVAEPolicy):
    """HunyuanVideo 1.5's pipeline parts."""

    pipeline_name = "HunyuanVideo15Pipeline"
    block_names = ("HunyuanVideo15TransformerBlock",)
    fps = 24.0

    def __init__(self, folder: Path, pipeline: Any, max_sequence_length: int):
        super().__init__(folder, pipeline, max_sequence_length)
        for module in self.transformers.values():
            dispatch(module)

    @classmethod
    def check(cls, folder: Path) -> None:
        """Whether the transformer is told one timestep, and guidance is plain.

        Raises:
            ConfigError: a meanflow transformer, or another guider; the message names what the folder has.
        """
        networks = networks_of(folder)
        for name in transformer_names(folder):
            if read_config(folder / name, networks[name])["use_meanflow"]:
                raise ConfigError(
                    f"{folder / name} sets use_meanflow to True: such a transformer is told where a step ends, too, "
                    "and steps by an average velocity, which no sampler here takes; take a folder without"
                )
        guider = read_index(folder).get("guider") or [None, None]
        if guider[1] != GUIDER:
            raise ConfigError(f"{folder} has the guider {guider[1]!r}; this family samples with {GUIDER!r} alone")
        settings = json.loads((folder / "guider" / "guider_config.json").read_text("utf-8"))
        for name, value in PLAIN_GUIDANCE.items():
            if settings.get(name, value) != value:
                raise ConfigError(
                    f"{folder / 'guider'} sets {name} to {settings[name]}; this family guides every step alike, with "
                    f"{value}: set it to that"
                )

    @classmethod
    def assemble(cls, folder: Path, parts: Mapping[str, nn.Module | None]) -> Any:
        """The pipeline asks its VAE for settings as it is made: where none is loaded, one of shapes alone answers."""
        if parts["vae"] is not None:
            return one_video_at_a_time(super().assemble(folder, parts))
        vae_class = networks_of(folder)["vae"]
        with torch.device("meta"):
            shapes = vae_class.from_config(read_config(folder / "vae", vae_class))
        pipeline = super().assemble(folder, {**parts, "vae": shapes})
        pipeline.register_modules(vae=None)
        return pipeline

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

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        return self.compressed(video, self.transformer_config["patch_size"])

    def bucket(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, among those of the folder's resolution, at which the pipeline makes such a picture."""
        processor = HunyuanVideo15ImageProcessor(vae_scale_factor=self.vae_config["spatial_compression_ratio"])
        sides = processor.calculate_default_height_width(height, width, self.transformer_config["target_size"])
        return int(sides[0]), int(sides[1])

    def call_defaults(self) -> dict[str, Any]:
        """A wide video of the folder's resolution, the text tokens of the pipeline and its guider's scale."""
        height, width = self.bucket(*ASPECT)
        guider = self.pipeline.guider.config
        return {
            "height": height,
            "width": width,
            "max_sequence_length": self.pipeline.tokenizer_max_length,
            "guidance_scale": guider.guidance_scale if guider.enabled else 1.0,
        }

    def take_settings(self, pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The guider holds the scale, and the pipeline the number of text tokens."""
        others = dict(settings)
        one_video_at_a_time(pipeline)
        pipeline.guider.enable()
        pipeline.guider.guidance_scale = others.pop("guidance_scale")
        pipeline.tokenizer_max_length = others.pop("max_sequence_length")
        return others

    def example(self) -> tuple[Latents, Conditioning]:
        config, generator = self.transformer_config, torch.Generator().manual_seed(0)
        sides = [2 * config[name] for name in ("patch_size_t", "patch_size", "patch_size")]
        latents = torch.randn(1, self.vae_config["latent_channels"], *sides, generator=generator)
        real = torch.tensor([[True, True, True, False]])
        return latents, {
            "prompt_embeds": torch.randn(1, 4, config["text_embed_dim"], generator=generator),
            "prompt_embeds_mask": real,
            "prompt_embeds_2": torch.randn(1, 4, config["text_embed_2_dim"], generator=generator),
            "prompt_embeds_mask_2": real,
        }

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        levels = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
        return scheduled_sigmas(self.pipeline.scheduler, levels.tolist(), shift)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        texts = conditioning["prompt_embeds"]
        timestep = sigma.to(latents.device) * self.pipeline.scheduler.config.num_train_timesteps
        channels = [latents, self.given_channels(latents, conditioning)]
        prediction = self.transformers(
            self.transformer_at(float(sigma.max())),
            hidden_states=torch.cat([part.to(texts.dtype) for part in channels], dim=1),
            timestep=timestep.expand(len(latents)).to(texts.dtype),  # its embedding is computed in this dtype
            encoder_hidden_states=texts,
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            encoder_hidden_states_2=conditioning["prompt_embeds_2"],
            encoder_attention_mask_2=conditioning["prompt_embeds_mask_2"],
            image_embeds=self.image_features(conditioning),
            return_dict=False,
        )[0]
        return prediction.float()

    def given_channels(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        """Clean latents of the given frames, and last a mask of them: here zeros, of the latents' size."""
        samples, channels, *size = latents.shape
        return latents.new_zeros(samples, self.transformer_config["in_channels"] - channels, *size)

    def image_features(self, conditioning: Conditioning) -> Tensor:
        """[samples, image_tokens, image_dim]: zeros, by which the transformer knows that there is no image.

        It masks as many tokens as there are; the pipeline's 729 and this one come to the same.
        """
        texts = conditioning["prompt_embeds"]
        return texts.new_zeros(len(texts), 1, self.transformer_config["image_embed_dim"])


def one_video_at_a_time(pipeline: Any) -> Any:
    """The pipeline whose VAE slices batches: attention within it has a mask that diffusers makes for one video."""
    pipeline.vae.enable_slicing()
    return pipeline
