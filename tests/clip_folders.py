"""Folders of video shards of the embedded world, encoded by the shipped policy; shared by tests and their ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from bpgo_video.config_io import read_recipe
from bpgo_video.data.clip_build import clip_stamp, encode_clip
from bpgo_video.data.fingerprint import encoder_stamp
from bpgo_video.data.prompt_records import PromptRecord, layout_of
from bpgo_video.data.shard_writing import write_index, write_negative, write_shard
from bpgo_video.policies import load_policy
from bpgo_video.sft_config import SftConfig
from bpgo_video.tiny import world
from tests.recipes import ROOT

RECIPE = ROOT / "pipelines" / "configs" / "tiny_wan_sft.yaml"
TRAIN, HELDOUT = 20, 5


def sft_recipe() -> SftConfig:
    config = read_recipe(RECIPE)
    assert isinstance(config, SftConfig)
    return config


def make_clips(folder: Path) -> Path:
    """TRAIN clips to learn from and HELDOUT others."""
    config = sft_recipe()
    policy = load_policy(config.policy.folder, max_sequence_length=config.policy.max_sequence_length)
    clear = [caption for caption in world.captions("train") if caption.is_clear]
    captions = [clear[i % len(clear)] for i in range(TRAIN + HELDOUT)]
    videos = world.render(world.sample_scenes(captions, torch.Generator().manual_seed(0)))
    texts = policy.encode([caption.text for caption in captions])["prompt_embeds"]
    records = [
        PromptRecord(
            number, caption.text, "train" if number < TRAIN else "heldout", conditioning={"prompt_embeds": text},
            clip=encode_clip(policy, video, config.video),
        )
        for number, (caption, video, text) in enumerate(zip(captions, videos, texts, strict=True))
    ]  # fmt: skip
    negative = {"prompt_embeds": policy.encode([""])["prompt_embeds"][0]}
    write_negative(folder, negative)
    layout = layout_of(negative, config.policy.max_sequence_length)
    shard = write_shard(folder / "clips-000000.tar", records, 0, layout)
    stamp = encoder_stamp(policy.folder, config.policy.max_sequence_length)
    write_index(folder, [shard], stamp, more=clip_stamp(policy.folder, config.video, takes_images=False))
    return folder
