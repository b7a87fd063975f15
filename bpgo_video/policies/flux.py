"""FLUX.1 text-to-image, [dev] and [schnell] (github.com/black-forest-labs/flux).

[dev] is distilled: its transformer takes a guidance scale, `policy.embedded_guidance`, and returns a guided velocity in
one pass. Classifier-free guidance (`sampler.guidance_scale`) is independent of it and comes on top. [schnell] has no
such input.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.policies.attention import SequencePlan, split_argument
from bpgo_video.policies.base import Arguments, Images, Shapes
from bpgo_video.policies.image import FlatVAE, PackedImagePolicy
from bpgo_video.types import Conditioning, Latents


class FluxPolicy(FlatVAE, PackedImagePolicy):
    """FLUX.1 text-to-image."""

    pipeline_name = "FluxPipeline"
    block_names = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    options = MappingProxyType({"embedded_guidance": 3.5})
    guidance_argument = "true_cfg_scale"
    length_tokenizer = "tokenizer_2"  # T5's; the other one is CLIP's
    one_dtype = True
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        rope=split_argument("img_ids", dim=0),
        head="proj_out",
        text_first=True,
    )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states, padding included, which the transformer sees; and CLIP's pooled states."""
        embeddings, pooled, _ = self.pipeline.encode_prompt(list(texts), max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def text_shapes(self, text_tokens: int) -> Shapes:
        config = self.transformer_config
        return {
            "prompt_embeds": (text_tokens, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        texts = conditioning["prompt_embeds"]
        _, rows, columns = (
            torch.arange(size, dtype=torch.float32, device=latents.device) for size in self.grid(latents)
        )
        guidance = torch.full((len(latents),), self.embedded_guidance, device=latents.device)
        return {
            **super().transformer_arguments(latents, sigma, conditioning),
            "pooled_projections": conditioning["pooled_prompt_embeds"],
            "guidance": guidance if self.transformer_config["guidance_embeds"] else None,
            "img_ids": torch.cartesian_prod(rows.new_zeros(1), rows, columns),
            "txt_ids": rows.new_zeros(texts.shape[1], 3),
        }

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """The noise, and the embedded guidance, which the pipeline's call names guidance_scale."""
        arguments = super().call_arguments(pipeline, latents, video, images)
        return {**arguments, "guidance_scale": self.embedded_guidance}
