"""SkyReels-V2: the example family of docs/new_family.md, built from the code on that page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, WanPipeline

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import TEXT_TOKENS, random_wan
from tests.made.recipes import ROOT

PAGE = ROOT / "docs" / "new_family.md"
MODULE = "skyreels_of_the_page"
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def random_skyreels(folder: Path) -> Path:
    """Wan's random encoder and VAE around a transformer of SkyReels' class."""
    parts = WanPipeline.from_pretrained(random_wan(folder.with_name("wan"))).components
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SkyReelsV2Transformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    pipeline = SkyReelsV2Pipeline(**{name: parts[name] for name in names}, transformer=transformer)
    pipeline.save_pretrained(folder)
    return folder


def as_module() -> ModuleType:
    """The page's Python code as an importable module."""
    found = sys.modules[MODULE] = ModuleType(MODULE)
    exec(compile(CODE, str(PAGE), "exec"), found.__dict__)
    return found


as_module()
SKYREELS = Case(
    random_skyreels, VideoConfig(9, 64, 64, 24.0), TEXT_TOKENS, family=f"{MODULE}:SkyReelsPolicy",
    euler=lambda unipc: FlowMatchEulerDiscreteScheduler(shift=unipc.config.flow_shift),
)  # fmt: skip
