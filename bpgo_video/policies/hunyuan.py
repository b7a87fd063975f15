"""How does HunyuanVideo text-to-video (arXiv 2412.03603) fit the policy protocol?

Its transformer is distilled: it is told a guidance scale, `policy.embedded_guidance`, and answers in one pass as if it
were guided by it. Classifier-free guidance (`sampler.guidance_scale`) is another thing, that comes on top.
Image-to-video is hunyuan_image.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.flow_match import scheduled_sigmas
from bpgo_video.policies.hunyuan_vae import HunyuanVAEPolicy
from bpgo_video.policies.pipeline_policy import networks_of, read_config
from bpgo_video.types import Conditioning, Latents, Velocity

GUIDANCE_UNIT = 1000.0  # of the scale that the transformer is told


class HunyuanVideoPolicy(HunyuanVAEPolicy):
    """HunyuanVideo's pipeline parts.

    Attributes:
        image_condition_types: how the transformers of this class are told of an image, by their config.
    """

    pipeline_name = "HunyuanVideoPipeline"
    block_names = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    fps = 24.0
    options = MappingProxyType({"embedded_guidance": 6.0})
    guidance_argument = "true_cfg_scale"
    image_condition_types: ClassVar[tuple[str | None, ...]] = (None,)

    @classmethod
    def check(cls, folder: Path) -> None:
        """Whether the transformer is told of images as the pipeline tells it.

        Raises:
            ConfigError: names what its config says.
        """
        found = image_condition_type(folder)
        if found not in cls.image_condition_types:
            raise ConfigError(
                f"{folder / 'transformer' / 'config.json'} sets image_condition_type to {found!r}; "
                f"{cls.pipeline_name} samples {list(cls.image_condition_types)}: leave policy.family out for what the "
                "folder's model_index.json says"
            )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """LLaMA's states of the text in the pipeline's template, with their mask, and CLIP's pooled ones."""
        embeddings, pooled, mask = self.pipeline.encode_prompt(
            list(texts), max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask.bool(), "pooled_prompt_embeds": pooled}

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        return self.compressed(video, self.transformer_config["patch_size"])

    def example(self) -> tuple[Latents, Conditioning]:
        config, generator = self.transformer_config, torch.Generator().manual_seed(0)
        frames, size = 2 * config["patch_size_t"], 2 * config["patch_size"]
        latents = torch.randn(1, self.vae_config["latent_channels"], frames, size, size, generator=generator)
        return latents, {
            "prompt_embeds": torch.randn(1, 4, config["text_embed_dim"], generator=generator),
            "prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool),
            "pooled_prompt_embeds": torch.randn(1, config["pooled_projection_dim"], generator=generator),
        }

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        levels = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
        return scheduled_sigmas(self.pipeline.scheduler, levels.tolist(), shift)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        dtype = conditioning["prompt_embeds"].dtype
        train_timesteps = self.pipeline.scheduler.config.num_train_timesteps
        prediction = self.transformers(
            self.transformer_at(float(sigma.max())),
            hidden_states=self.transformer_input(latents, conditioning).to(dtype),
            timestep=(sigma.to(latents.device) * train_timesteps).expand(len(latents)),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            guidance=self.told_guidance(len(latents), dtype, latents.device),
            return_dict=False,
        )[0]
        return prediction[:, :, self.given_frames :].float()

    def told_guidance(self, samples: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "samples"] | None:
        """`embedded_guidance` in the transformer's unit, of each sample; None where it has no input for it."""
        if not self.transformer_config["guidance_embeds"]:
            return None
        return torch.full((samples,), self.embedded_guidance, dtype=dtype, device=device) * GUIDANCE_UNIT

    def transformer_input(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        """What enters the first layer: here the noisy latents alone."""
        return latents

    @property
    def embedded_guidance(self) -> float:
        """The guidance scale that the transformer is told."""
        scale = self.options["embedded_guidance"]
        assert scale is not None
        return scale

    def call_arguments(
        self,
        pipeline: Any,
        latents: Latents,
        video: VideoConfig,
        images: Float[Tensor, "samples 3 height width"] | None,
    ) -> dict[str, Any]:
        """The noise, and what the transformer is told: the pipeline names it guidance_scale."""
        return {"latents": latents, "guidance_scale": self.embedded_guidance}


def image_condition_type(folder: Path) -> str | None:
    """How a pipeline's transformer is told of an image, by its config; None of one that is not."""
    found: str | None = read_config(folder / "transformer", networks_of(folder)["transformer"])["image_condition_type"]
    return found
