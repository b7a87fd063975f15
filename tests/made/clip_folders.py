"""Shards of clips of the embedded world, encoded by the shipped policy; shared by tests and their ranks."""

from __future__ import annotations

from pathlib import Path

from bpgo_video.config.reading import read_recipe
from bpgo_video.config.sft import SftConfig
from tests.made.recipes import ROOT
from tools.tiny.warm_start import write_clips

RECIPE = ROOT / "pipelines" / "configs" / "tiny_wan_sft.yaml"
TRAIN, HELDOUT = 20, 5


def sft_recipe() -> SftConfig:
    config = read_recipe(RECIPE)
    assert isinstance(config, SftConfig)
    return config


def make_clips(folder: Path) -> Path:
    """Write TRAIN training clips and HELDOUT held-out clips."""
    return write_clips(sft_recipe().policy.folder, folder, TRAIN, HELDOUT)
