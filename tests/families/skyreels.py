"""SkyReels-V2: text-to-video, image-to-video with CLIP, and diffusion forcing with all frames at one noise level."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.policies.wan import TEXT_BESIDE_IMAGES
from tests.families.case import Case
from tests.families.wan import euler
from tests.made.random_wan import TEXT_TOKENS, random_wan, wan_vae

VIDEO = VideoConfig(num_frames=9, height=64, width=64, fps=24.0)


def random_skyreels(folder: Path, kind: Any = SkyReelsV2Pipeline, images: bool = False, **config: Any) -> Path:
    """Wan's random encoders around a transformer of SkyReels' class and a VAE of the published layout."""
    with TemporaryDirectory() as scratch:
        parts = DiffusionPipeline.from_pretrained(
            random_wan(Path(scratch), images=images, image_encoder=images)
        ).components
    own: dict[str, Any] = (
        {"in_channels": 12, "image_dim": 24, "added_kv_proj_dim": 32} if images else {"in_channels": 4}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SkyReelsV2Transformer3DModel(
            num_attention_heads=2, attention_head_dim=16, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
            num_layers=2, rope_max_seq_len=32, **own, **config,
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        parts["vae"] = wan_vae()
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                patch_size=8, projection_dim=8,
            )
        )  # fmt: skip
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    encoder = {"image_encoder": vision, "image_processor": parts["image_processor"]} if images else {}
    kind(**{name: parts[name] for name in names}, **encoder, transformer=transformer).save_pretrained(folder)
    return folder


class WholeTimesteps(FlowMatchEulerDiscreteScheduler):
    """Euler's method for a pipeline that passes its timesteps without their fractions."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        index = self.step_index or 0
        assert int(timestep) == int(self.timesteps[index])
        return super().step(model_output, self.timesteps[index], sample, **options)


def whole(unipc: Any) -> WholeTimesteps:
    return WholeTimesteps(shift=unipc.config.flow_shift)


FORCING = partial(random_skyreels, kind=SkyReelsV2DiffusionForcingPipeline)
SKYREELS_TEXT = Case(random_skyreels, VIDEO, TEXT_TOKENS, euler=euler)
SKYREELS_IMAGE = Case(
    partial(random_skyreels, kind=SkyReelsV2ImageToVideoPipeline, images=True), VIDEO, TEXT_BESIDE_IMAGES, euler=euler
)
SKYREELS_FORCING = Case(partial(FORCING, inject_sample_info=True), VIDEO, TEXT_TOKENS, euler=whole)
