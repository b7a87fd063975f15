"""How does CogVideoX (arXiv 2408.06072), which predicts v, fit the policy protocol? In coordinates of rectified flow.

Its own are x = alpha data + s noise with alpha^2 + s^2 = 1, and v = alpha noise - s data. Divided by alpha + s, x is a
rectified flow at sigma = s / (alpha + s), whose velocity follows from v:

    x' = x / (alpha + s) = (1 - sigma) data + sigma noise,    noise - data = (s - alpha) x + (alpha + s) v

So DDIM without noise (arXiv 2010.02502) is Euler's method in x', exactly. Since alpha + s = 1 / |(1 - sigma, sigma)|,
alpha and s are exact at every sigma; the transformer is told the nearest timestep that it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.diffusion import sde
from bpgo_video.policies.cogvideox_attention import dispatch
from bpgo_video.policies.pipeline_policy import PipelinePolicy
from bpgo_video.types import Conditioning, Latents, Velocity, Videos

SCHEDULE = {  # what makes pure noise the start and clean data the end, at steps that the mapping above holds for
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
PATCH_FRAMES = (None, 2)  # latent frames in a token's patch: one, or CogVideoX 1.5's two


class CogVideoXPolicy(PipelinePolicy):
    """CogVideoX text-to-video: 2B, 5B and 1.5.

    1.5 takes latent frames in pairs. A VAE's are odd in number, so that one more is sampled in front, and dropped.
    """

    pipeline_name = "CogVideoXPipeline"
    block_names = ("CogVideoXBlock",)
    one_dtype = True

    def __init__(self, folder: Path, pipeline: Any, max_sequence_length: int):
        super().__init__(folder, pipeline, max_sequence_length)
        for module in self.transformers.values():
            dispatch(module)
        self.padding_frames = 0 if self.transformer_config["patch_size_t"] is None else 1
        self.fps = 16.0 if self.padding_frames else 8.0

    @cached_property
    def levels(self) -> Tensor:
        """Sigma of every timestep of training: [timesteps], fp64."""
        alpha_squared = self.pipeline.scheduler.alphas_cumprod.double()
        alpha, s = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        return s / (alpha + s)

    @classmethod
    def check(cls, folder: Path) -> None:
        """Whether the noise schedule runs from pure noise to clean data, and patches are known.

        Raises:
            ConfigError: names what the folder sets.
        """
        for file, allowed in (
            ("scheduler/scheduler_config.json", {name: (value,) for name, value in SCHEDULE.items()}),
            ("transformer/config.json", {"patch_size_t": PATCH_FRAMES}),
        ):
            found = json.loads((folder / file).read_text("utf-8"))
            for name, values in allowed.items():
                if found.get(name) not in values:
                    raise ConfigError(
                        f"{folder / file} sets {name} to {found.get(name)!r}; this family samples {list(values)}, as "
                        "all of CogVideoX' published folders have it"
                    )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` of T5, padding included: the transformer attends to it.

        Raises:
            ConfigError: not as many tokens as the transformer has positions for.
        """
        positions = self.transformer_config["max_text_seq_length"]
        if self._adds_positions and self.max_sequence_length != positions:
            raise ConfigError(
                f"policy.max_sequence_length is {self.max_sequence_length}, but this transformer adds positions to "
                f"{positions} text tokens; set it to {positions}"
            )
        embeddings, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings}

    @property
    def _adds_positions(self) -> bool:
        """To text and video: of 2B, whose are not rotary, and of 5B image-to-video, which learned some beside."""
        config = self.transformer_config
        return not config["use_rotary_positional_embeddings"] or bool(config["use_learned_positional_embeddings"])

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        temporal = int(self.vae_config["temporal_compression_ratio"])
        spatial = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        self.check_size(video, 2 * temporal, spatial * self.transformer_config["patch_size"])  # the VAE decodes pairs
        if self.transformer_config["use_learned_positional_embeddings"]:
            self._check_learned_size(video, spatial)
        frames = (video.num_frames - 1) // temporal + 1 + self.padding_frames
        return int(self.vae_config["latent_channels"]), frames, video.height // spatial, video.width // spatial

    def _check_learned_size(self, video: VideoConfig, spatial: int) -> None:
        config = self.transformer_config
        learned = (config["sample_frames"], config["sample_height"] * spatial, config["sample_width"] * spatial)
        if learned != (video.num_frames, video.height, video.width):
            raise ConfigError(
                f"video is {video.num_frames} frames of {video.height} x {video.width}, but this transformer has "
                f"learned positions for {learned[0]} of {learned[1]} x {learned[2]} alone; set video to these"
            )

    def call_defaults(self) -> dict[str, int]:
        config = self.transformer_config
        spatial = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        sides = {name: config[f"sample_{name}"] * spatial for name in ("height", "width")}
        return {"num_frames": config["sample_frames"], **sides}

    def example(self) -> tuple[Latents, Conditioning]:
        config, generator = self.transformer_config, torch.Generator().manual_seed(0)
        fixed = config["use_learned_positional_embeddings"]
        sides = [config[f"sample_{name}"] if fixed else 2 * config["patch_size"] for name in ("height", "width")]
        tokens = config["max_text_seq_length"] if self._adds_positions else 4
        latents = torch.randn(
            1, self.vae_config["latent_channels"], 1 + self.padding_frames, *sides, generator=generator
        )
        return latents, {"prompt_embeds": torch.randn(1, tokens, config["text_embed_dim"], generator=generator)}

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """Those of the scheduler's timesteps, then 0; with a shift, those of every rectified flow.

        They are DDIM's where num_steps divides the timesteps of training. Else diffusers' DDIM aims at the timestep
        beside the next step's, and each step starts from a level that the one before did not end at; these do not.
        """
        if shift is not None:
            return sde.shifted_sigmas(num_steps, shift)
        own = self.pipeline.scheduler
        scheduler = type(own).from_config(own.config)  # a new one: timesteps are its state
        scheduler.set_timesteps(num_steps)
        return torch.cat([self.levels[scheduler.timesteps], torch.zeros(1)]).float()

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        level, dtype = sigma.double().reshape(-1, 1, 1, 1, 1), conditioning["prompt_embeds"].dtype
        timestep = (self.levels - level.reshape(-1, 1)).abs().argmin(dim=1)
        total = 1 / torch.hypot(1 - level, level)  # alpha + s
        total, difference = (x.float().to(latents.device) for x in (total, (2 * level - 1) * total))  # s - alpha
        noisy = latents.float() * total
        prediction = self.transformers(
            self.transformer_at(float(sigma.max())),
            hidden_states=self.transformer_input(noisy, conditioning).to(dtype).transpose(1, 2),
            timestep=timestep.to(latents.device).expand(len(latents)),
            encoder_hidden_states=conditioning["prompt_embeds"],
            image_rotary_emb=self._rotary(latents),
            return_dict=False,
            **self.transformer_arguments(latents),
        )[0]
        return difference * noisy + total * prediction.transpose(1, 2).float()

    def transformer_input(self, noisy: Latents, conditioning: Conditioning) -> Tensor:
        """What enters the first layer, along channels: here the noisy latents alone."""
        return noisy

    def transformer_arguments(self, latents: Latents) -> dict[str, Tensor]:
        """What the transformer is told beside."""
        return {}

    def _rotary(self, latents: Latents) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the video's tokens, [tokens, head dim], where the transformer rotates."""
        config = self.transformer_config
        if not config["use_rotary_positional_embeddings"]:
            return None
        height, width = (size // config["patch_size"] for size in latents.shape[3:])
        base_height, base_width = (config[f"sample_{name}"] // config["patch_size"] for name in ("height", "width"))
        if config["patch_size_t"] is None:  # the grid that was trained on, stretched over this one
            crop = get_resize_crop_region_for_grid((height, width), base_width, base_height)
            grid: dict[str, Any] = {"crops_coords": crop}
        else:  # a part of the grid that was trained on
            grid = {"crops_coords": None, "grid_type": "slice", "max_size": (base_height, base_width)}
        frames = latents.shape[2] // (config["patch_size_t"] or 1)
        rotary: Any = get_3d_rotary_pos_embed(
            config["attention_head_dim"], grid_size=(height, width), temporal_size=frames, device=latents.device, **grid
        )
        return rotary[0], rotary[1]

    @torch.no_grad()
    def encode_video(self, videos: Videos) -> Latents:
        """The frame that is dropped is the first one again."""
        vae: Any = self.pipeline.vae
        pixels = (2 * videos - 1).transpose(1, 2).to(vae.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode().float() * self.vae_config["scaling_factor"]
        return torch.cat([latents[:, :, : self.padding_frames], latents], dim=2)

    @torch.no_grad()
    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        vae = self.pipeline.vae
        seen = latents[:, :, self.padding_frames :] / self.vae_config["scaling_factor"]
        pixels = vae.decode(seen.to(vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def call_arguments(
        self,
        pipeline: Any,
        latents: Latents,
        video: VideoConfig,
        images: Float[Tensor, "samples 3 height width"] | None,
    ) -> dict[str, Any]:
        return {"latents": latents.transpose(1, 2).to(pipeline.transformer.dtype)}
