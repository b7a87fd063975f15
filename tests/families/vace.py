"""Wan VACE: under a control video, a reference image, or both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline, WanVACEPipeline, WanVACETransformer3DModel

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.families.wan import euler
from tests.made.random_wan import TEXT_TOKENS, random_wan, wan_vae

VIDEO = VideoConfig(num_frames=9, height=64, width=64, fps=8.0)
MODULE = "bpgo_video.policies.wan_vace"


def random_vace(folder: Path) -> Path:
    """Wan's random encoder around a transformer of VACE's class and a VAE of the published layout."""
    with TemporaryDirectory() as scratch:
        parts = DiffusionPipeline.from_pretrained(random_wan(Path(scratch))).components
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = WanVACETransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=3, rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=2 * 4 + 8 * 8,
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        vae = wan_vae()
    names = ("tokenizer", "text_encoder", "scheduler")
    WanVACEPipeline(**{name: parts[name] for name in names}, vae=vae, transformer=transformer).save_pretrained(folder)
    return folder


VACE = Case(random_vace, VIDEO, TEXT_TOKENS, euler=euler, encodes_clips=False)
VACE_IMAGE = replace(VACE, family=f"{MODULE}:ReferenceImagePolicy")
VACE_BOTH = replace(VACE, family=f"{MODULE}:ControlVideoAndImagePolicy")
