"""How does Wan 2.1 text-to-video (arXiv 2503.20314) fit the policy protocol?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from jaxtyping import Float
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from bpgo_video import sde
from bpgo_video.config import ConfigError, VideoConfig
from bpgo_video.policies.base import Build, Trained, frozen
from bpgo_video.types import Conditioning, Latents, Velocity, Videos


class WanPolicy:
    """Wan's pipeline parts; text encoder and VAE may be absent where embeddings or latents are all that is needed."""

    block_classes: tuple[type[nn.Module], ...] = (WanTransformerBlock,)
    pipeline_name = "WanPipeline"  # looked up late: importing a pipeline that is not used may print warnings
    takes_images = False

    def __init__(self, folder: Path, pipeline: Any, max_sequence_length: int):
        self.folder = folder
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.transformers: Trained = {"transformer": self.pipeline.transformer} if self.pipeline.transformer else {}
        self.transformer_config: dict[str, Any] = WanTransformer3DModel.load_config(folder / "transformer")
        self.vae_config: dict[str, Any] = AutoencoderKLWan.load_config(folder / "vae")

    @classmethod
    def load(
        cls,
        folder: Path,
        max_sequence_length: int,
        components: frozenset[str],
        dtype: torch.dtype,
        device: torch.device,
        build: Build,
    ) -> WanPolicy:
        """The parts of the folder named in `components`; see `load_policy`."""
        cls.refuse_later_versions(folder)
        parts: dict[str, nn.Module | None] = dict.fromkeys(("text_encoder", "vae", "transformer"))
        if "text_encoder" in components:
            parts["text_encoder"] = frozen(
                UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype), device
            )
        if "vae" in components:
            parts["vae"] = frozen(AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32), device)
        if "transformer" in components:
            parts["transformer"] = build(WanTransformer3DModel, folder / "transformer", dtype).to(device)
        if cls.takes_images:
            parts["image_encoder"] = cls.image_encoder(folder, dtype, device) if "image_encoder" in components else None
        return cls(folder, getattr(diffusers, cls.pipeline_name).from_pretrained(folder, **parts), max_sequence_length)

    @staticmethod
    def refuse_later_versions(folder: Path) -> None:
        """Wan 2.2's pipelines bear the same class names, and differ in how they denoise.

        Raises:
            ConfigError: two transformers, or a noise level for each token.
        """
        index = json.loads((folder / "model_index.json").read_text())
        for key in ("boundary_ratio", "expand_timesteps"):
            if index.get(key):
                raise ConfigError(f"{folder} sets {key} (Wan 2.2), which this family does not do; Wan 2.1 works")

    @classmethod
    def image_encoder(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module | None:
        """The encoder of conditioning images, where the folder has one."""
        return None

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        embeddings, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings}

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        temporal, spatial = self.vae_config["scale_factor_temporal"], self.vae_config["scale_factor_spatial"]
        _, patch_height, patch_width = self.transformer_config["patch_size"]
        if video.num_frames % temporal != 1 % temporal:
            raise ConfigError(
                f"video.num_frames is {video.num_frames}; this policy makes {temporal} n + 1 frames, for example "
                f"{video.num_frames // temporal * temporal + 1}"
            )
        for name, size, patch in (("height", video.height, patch_height), ("width", video.width, patch_width)):
            if size % (spatial * patch):
                raise ConfigError(f"video.{name} is {size}; this policy needs a multiple of {spatial * patch}")
        channels = self.vae_config["z_dim"]
        frames = (video.num_frames - 1) // temporal + 1
        return channels, frames, video.height // spatial, video.width // spatial

    def example(self) -> tuple[Latents, Conditioning]:
        config, generator = self.transformer_config, torch.Generator().manual_seed(0)
        frames, height, width = config["patch_size"]
        latents = torch.randn(1, self.vae_config["z_dim"], 2 * frames, 2 * height, 2 * width, generator=generator)
        texts = torch.randn(1, 4, config["text_dim"], generator=generator)
        return latents, {"prompt_embeds": texts}

    def sigmas(self, num_steps: int, shift: float | None = None) -> Tensor:
        scheduler = self.pipeline.scheduler.config
        own = scheduler.get("flow_shift", scheduler.get("shift", 1.0))
        return sde.shifted_sigmas(num_steps, own if shift is None else shift)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        transformer = self.transformers["transformer"]
        dtype = conditioning["prompt_embeds"].dtype
        timestep = (sigma * self.pipeline.scheduler.config.num_train_timesteps).expand(latents.shape[0])
        prediction = transformer(
            hidden_states=self.transformer_input(latents, conditioning).to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_image=conditioning.get("image_embeds"),
            return_dict=False,
        )[0]
        return prediction.float()

    def transformer_input(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        """What enters the first layer: here the noisy latents alone."""
        return latents

    def image_conditioning(
        self, images: Float[Tensor, "prompts 3 height width"], video: VideoConfig
    ) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} makes videos of texts alone")

    def latent_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, by channel: the policy's latents have 0 and 1."""
        config = self.vae_config
        mean, std = (torch.tensor(config[f"latents_{name}"], device=device) for name in ("mean", "std"))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode_video(self, videos: Videos) -> Latents:
        vae = self.pipeline.vae
        pixels = (2 * videos - 1).transpose(1, 2).to(vae.device, vae.dtype)
        encoded = vae.encode(pixels).latent_dist.mode()
        mean, std = self.latent_statistics(encoded.device)
        return ((encoded - mean) / std).float()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Videos:
        vae = self.pipeline.vae
        mean, std = self.latent_statistics(latents.device)
        pixels = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
