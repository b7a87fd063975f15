"""Wan 2.1: text-to-video, one frame of it (text-to-image), and image-to-video with its CLIP encoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.policies.wan import TEXT_BESIDE_IMAGES
from tests.families.case import Case
from tests.made.random_wan import TEXT_TOKENS, random_wan

VIDEO = VideoConfig(num_frames=9, height=64, width=64, fps=8.0)


def euler(unipc):
    return FlowMatchEulerDiscreteScheduler(shift=unipc.config.flow_shift)


WAN = Case(random_wan, VIDEO, TEXT_TOKENS, euler=euler)
WAN_ONE_FRAME = Case(random_wan, replace(VIDEO, num_frames=1), TEXT_TOKENS, euler=euler)
WAN_IMAGE = Case(
    partial(random_wan, images=True, image_encoder=True), VIDEO, TEXT_BESIDE_IMAGES, euler=euler
)  # for another number diffusers would treat image tokens as text
