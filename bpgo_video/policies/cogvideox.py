"""CogVideoX text-to-video and image-to-video (arXiv 2408.06072): 2B, 5B and 1.5, which predict v.

CogVideoX is trained on x = alpha data + s noise with alpha^2 + s^2 = 1, and predicts v = alpha noise - s data. Divided
by alpha + s, x is a rectified flow at sigma = s / (alpha + s), whose velocity follows from v:

    x' = x / (alpha + s) = (1 - sigma) data + sigma noise,    noise - data = (s - alpha) x + (alpha + s) v

So DDIM without noise (arXiv 2010.02502) is Euler's method in x', exactly. Since alpha + s = 1 / |(1 - sigma, sigma)|,
alpha and s are exact at every sigma; the transformer takes the nearest timestep of its training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.diffusion import sde
from bpgo_video.policies.attention import Processor, Rotary, SequencePlan, by_head, replace_processors, split_argument
from bpgo_video.policies.base import AllFrames, Arguments, Images, LatentShape, Policy, Shapes, then_zeros
from bpgo_video.types import Conditioning, Latents, Velocity, Videos

OFFSET = 2.0  # diffusers' pipeline passes it to CogVideoX 1.5 image-to-video


class CogVideoXAttention(Processor):
    """Joint attention of text tokens, which come first, and of the video's tokens, which are rotated; no mask.

    diffusers' own processor calls PyTorch's attention directly, so sequence groups and other backends would not work.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "samples tokens dim"],
        encoder_hidden_states: Float[Tensor, "samples text dim"],
        attention_mask: None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention's output for video and text tokens."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = by_head(attn, joint, attn.to_q, attn.to_k, attn.to_v)
        query, key = (rotated(x, image_rotary_emb, text) for x in (attn.norm_q(query), attn.norm_k(key)))
        output = self.attend(query, key, value)
        for layer in attn.to_out:
            output = layer(output)
        return output[:, text:], output[:, :text]


def rotated(x: Float[Tensor, "samples joint heads head_dim"], rotary: Rotary | None, text: int) -> Tensor:
    """The tokens after the text rotated by their positions [tokens head_dim], if there are any."""
    if rotary is None:
        return x
    video: Any = apply_rotary_emb(x[:, text:], cast(Any, rotary), sequence_dim=1)  # both annotated as something else
    return torch.cat([x[:, :text], video], dim=1)


# Attention through diffusers' dispatcher.
use_dispatcher = partial(replace_processors, attention="attn1", processor=CogVideoXAttention)


class CogVideoXPolicy(Policy):
    """CogVideoX text-to-video.

    1.5 takes latent frames in pairs. A VAE's are odd in number, so one more is sampled before them and dropped.
    """

    pipeline_name = "CogVideoXPipeline"
    block_names = ("CogVideoXBlock",)
    one_dtype = True
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks",),
        rope=split_argument("image_rotary_emb", dim=0),
        head="proj_out",
        text_first=True,
        attention=use_dispatcher,
    )
    required_settings = MappingProxyType(
        {
            "scheduler": {  # a schedule from pure noise to clean data, as the mapping above requires
                "prediction_type": ("v_prediction",),
                "rescale_betas_zero_snr": (True,),
                "set_alpha_to_one": (True,),
                "timestep_spacing": ("trailing",),
            },
            "transformer": {"patch_size_t": (None, 2)},  # latent frames in a token: one, or two in CogVideoX 1.5
        }
    )

    def __init__(self, folder: Path, pipeline: Any, max_sequence_length: int):
        super().__init__(folder, pipeline, max_sequence_length)
        self.padding_frames = 0 if self.transformer_config["patch_size_t"] is None else 1
        self.fps = 16.0 if self.padding_frames else 8.0

    def prepare(self, transformer: Any) -> None:
        use_dispatcher(transformer)

    @cached_property
    def levels(self) -> Tensor:
        """Sigma of every timestep of training: [timesteps], fp64."""
        alpha_squared = self.pipeline.scheduler.alphas_cumprod.double()
        alpha, s = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        return s / (alpha + s)

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states; the transformer attends to padding, too."""
        positions = self.transformer_config["max_text_seq_length"]
        if self._adds_positions and self.max_sequence_length != positions:
            raise ConfigError(
                f"policy.max_sequence_length is {self.max_sequence_length}, but this transformer adds positions to "
                f"{positions} text tokens; set it to {positions}"
            )
        return super().encode(texts)

    @property
    def _adds_positions(self) -> bool:
        """Positions are added to text and video: in 2B (not rotary), and in 5B image-to-video (learned and rotary)."""
        config = self.transformer_config
        return not config["use_rotary_positional_embeddings"] or bool(config["use_learned_positional_embeddings"])

    def text_shapes(self, text_tokens: int) -> Shapes:
        config = self.transformer_config
        tokens = config["max_text_seq_length"] if self._adds_positions else text_tokens
        return {"prompt_embeds": (tokens, config["text_embed_dim"])}

    @property
    def strides(self) -> tuple[int, int]:
        return self.vae_config["temporal_compression_ratio"], 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        (temporal, spatial), config = self.strides, self.transformer_config
        self.check_size(video, 2 * temporal, spatial * config["patch_size"])  # the VAE decodes frames in pairs
        if config["use_learned_positional_embeddings"]:
            learned = (config["sample_frames"], config["sample_height"] * spatial, config["sample_width"] * spatial)
            if learned != (video.num_frames, video.height, video.width):
                raise ConfigError(
                    f"video is {video.num_frames} frames of {video.height} x {video.width}, but this transformer has "
                    f"learned positions for {learned[0]} of {learned[1]} x {learned[2]} alone; set video to these"
                )
        frames = (video.num_frames - 1) // temporal + 1 + self.padding_frames
        return self.latent_channels, frames, video.height // spatial, video.width // spatial

    def example_shape(self) -> LatentShape:
        config, shape = self.transformer_config, super().example_shape()
        if config["use_learned_positional_embeddings"]:
            return (*shape[:2], config["sample_height"], config["sample_width"])
        return shape

    def call_defaults(self) -> dict[str, int]:
        config, spatial = self.transformer_config, self.strides[1]
        sides = {name: config[f"sample_{name}"] * spatial for name in ("height", "width")}
        return {"num_frames": config["sample_frames"], **sides}

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """Those of the scheduler's timesteps, then 0; with a shift, those of every rectified flow.

        They are DDIM's if num_steps divides the timesteps of training. If not, diffusers' DDIM steps to a timestep
        beside the next step's, so each of its steps starts from a level at which the step before did not end.
        """
        if shift is not None:
            return sde.shifted_sigmas(num_steps, shift)
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)  # its timesteps are state
        scheduler.set_timesteps(num_steps)
        return torch.cat([self.levels[scheduler.timesteps], torch.zeros(1)]).float()

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        level, texts = sigma.double().reshape(-1, 1, 1, 1, 1), conditioning["prompt_embeds"]
        timestep = (self.levels - level.reshape(-1, 1)).abs().argmin(dim=1)
        total = 1 / torch.hypot(1 - level, level)  # alpha + s
        total, difference = (x.float().to(latents.device) for x in (total, (2 * level - 1) * total))  # s - alpha
        noisy = latents.float() * total
        prediction = self.predict(
            sigma,
            hidden_states=self.hidden_states(noisy, conditioning).to(texts.dtype).transpose(1, 2),
            timestep=timestep.to(latents.device).expand(len(latents)),
            encoder_hidden_states=texts,
            image_rotary_emb=self._rotary(latents),
            **self.transformer_arguments(latents, sigma, conditioning),
        )[0]
        return difference * noisy + total * prediction.transpose(1, 2).float()

    def _rotary(self, latents: Latents) -> Rotary | None:
        """Cosines and sines of the video's tokens, [tokens, head_dim], if the transformer rotates."""
        config = self.transformer_config
        if not config["use_rotary_positional_embeddings"]:
            return None
        frames, height, width = self.grid(latents)
        base_height, base_width = (config[f"sample_{name}"] // config["patch_size"] for name in ("height", "width"))
        if config["patch_size_t"] is None:  # the grid of training, stretched over this one
            crop = get_resize_crop_region_for_grid((height, width), base_width, base_height)
            grid: dict[str, Any] = {"crops_coords": crop}
        else:  # a part of the grid of training
            grid = {"crops_coords": None, "grid_type": "slice", "max_size": (base_height, base_width)}
        rotary: Any = get_3d_rotary_pos_embed(
            config["attention_head_dim"], grid_size=(height, width), temporal_size=frames, device=latents.device, **grid
        )
        return rotary[0], rotary[1]

    def encode_video(self, videos: Videos) -> Latents:
        """The dropped frame repeats the first one."""
        latents = super().encode_video(videos)
        return torch.cat([latents[:, :, : self.padding_frames], latents], dim=2)

    def decode_frames(self, latents: AllFrames) -> Videos:
        return super().decode_frames(latents[:, :, self.padding_frames :])

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        return {"latents": latents.transpose(1, 2).to(pipeline.transformer.dtype)}


class CogVideoXImagePolicy(CogVideoXPolicy):
    """CogVideoX image-to-video: further channels hold the image's latents, then zeros.

    They are the mode of the VAE's posterior, so that all ranks and samples see the same; diffusers draws from it.
    """

    pipeline_name = "CogVideoXImageToVideoPipeline"
    takes_images = True
    image_channels = True

    def call_defaults(self) -> dict[str, int]:
        """Height and width; the pipeline's call has a default number of frames."""
        return {name: size for name, size in super().call_defaults().items() if name != "num_frames"}

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        return {} if self.transformer_config["ofs_embed_dim"] is None else {"ofs": latents.new_full((1,), OFFSET)}

    def conditioning_shapes(self, latents: LatentShape, text_tokens: int) -> Shapes:
        return {**self.text_shapes(text_tokens), "image_latents": latents}

    @torch.no_grad()
    def image_conditioning(self, images: Images, video: VideoConfig) -> dict[str, Tensor]:
        """`image_latents`, as many frames as are sampled; the first is the image's."""
        first, scale = self.vae_latents(self.pipeline.vae, images[:, None]), self.vae_config["scaling_factor"]
        first = first / scale if self.vae_config["invert_scale_latents"] else first * scale  # as each was trained
        return {"image_latents": then_zeros(first, self.latent_shape(video)[1])}
