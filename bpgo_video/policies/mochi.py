"""Mochi 1 text-to-video (github.com/genmoai/mochi): time runs from noise to data, and it predicts data - noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.diffusion import sde
from bpgo_video.policies.attention import JointAttention, Rotary, SequencePlan, replace_processors, split_rope
from bpgo_video.policies.base import Arguments, Policy, Shapes
from bpgo_video.types import Conditioning, Latents, Velocity

THRESHOLD_NOISE = 0.025  # of the schedule in diffusers and the authors' code: its first half ends at 1 - this
DEFAULT_SIZE = {"height": 480, "width": 848}  # set by diffusers' pipeline


def rotated(x: Float[Tensor, "samples tokens heads head_dim"], rotary: Rotary) -> Tensor:
    """Pairs of neighbouring numbers turned by the angles [tokens heads half] of their token and head."""
    cos, sin = rotary
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


# Attention through the dispatcher, with a mask of keys.
mask_keys = partial(replace_processors, attention="attn1", processor=partial(JointAttention, rotated))


class MochiPolicy(Policy):
    """Mochi text-to-video."""

    pipeline_name = "MochiPipeline"
    block_names = ("MochiTransformerBlock",)
    fps = 30.0
    one_dtype = True
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks",), rope=split_rope("rope", dim=0), head="proj_out", attention=mask_keys
    )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states and the mask of real tokens; one by one, since an empty text may blank its whole batch."""
        rows = [
            self.pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )
            for text in texts
        ]
        return {"prompt_embeds": torch.cat([row[0] for row in rows]), "mask": torch.cat([row[1] for row in rows])}

    def text_shapes(self, text_tokens: int) -> Shapes:
        return {"prompt_embeds": (text_tokens, self.transformer_config["text_embed_dim"]), "mask": (text_tokens,)}

    @property
    def strides(self) -> tuple[int, int]:
        return math.prod(self.vae_config["temporal_expansions"]), math.prod(self.vae_config["spatial_expansions"])

    def call_defaults(self) -> dict[str, int]:
        return DEFAULT_SIZE

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        default = self.pipeline.scheduler.config["shift"]
        levels = torch.tensor(linear_quadratic_schedule(num_steps, THRESHOLD_NOISE), dtype=torch.float64)
        return torch.cat([sde.flow_shift(levels, default if shift is None else shift), levels.new_zeros(1)]).float()

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        timestep = self.timesteps(latents, 1 - sigma).to(conditioning["prompt_embeds"].dtype)
        return {"timestep": timestep, "encoder_attention_mask": conditioning["mask"]}

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        return -super().velocity(latents, sigma, conditioning)
