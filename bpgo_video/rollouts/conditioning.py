"""Conditioning of prompts: complete on the CPU, then the rows of a micro-batch on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from bpgo_video.config.bpgo import Config
from bpgo_video.data.clips import read_clip
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.types import Conditioning, Guidance, PromptBatch


def guidance_of(prompts: PromptBatch, rows: Int[Tensor, "samples"], device: torch.device) -> Guidance:
    """Prompt and negative prompt of each sample, moved to the device; `rows` are the samples' prompts."""
    negative_rows = torch.zeros_like(rows) if prompts.negative_rows is None else prompts.negative_rows[rows]
    return Guidance(rows_of(prompts.conditioning, rows, device), rows_of(prompts.negative, negative_rows, device))


def rows_of(conditioning: Conditioning, rows: Int[Tensor, "samples"], device: torch.device) -> dict[str, Tensor]:
    """These rows on the device; each distinct row is copied once, however many samples of a group share it."""
    distinct, inverse = rows.unique(return_inverse=True)
    moved = {name: value[distinct].to(device, non_blocking=True) for name, value in conditioning.items()}
    return {name: value[inverse.to(device)] for name, value in moved.items()}


def cast(conditioning: Conditioning, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`, token masks in their own dtype, all on the device."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in conditioning.items()
    }


def for_each(row: Conditioning, count: int) -> dict[str, Tensor]:
    """One row expanded to `count` samples."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in row.items()}


def image_size(config: Config, policy: Policy) -> tuple[int, int] | None:
    """Height and width at which the prompts' images are read; None for a policy that takes no images."""
    return (config.video.height, config.video.width) if policy.takes_images else None


def conditioned(
    prompts: PromptBatch,
    policy: Policy,
    config: Config,
    dtype: torch.dtype,
    mesh: Mesh,
    group_size: int,
) -> PromptBatch:
    """The prompts with their complete conditioning in `dtype`, on the CPU.

    Encoding an image costs as much as encoding a video. Each rank encodes only the images and control videos of its own
    samples, once for all samples of a prompt; the rows of other ranks' stay zero.

    Args:
        group_size: samples to be made of each prompt.
    """
    of_video = for_each(policy.video_conditioning(config.video), len(prompts))
    conditioning, negative = {**cast(prompts.conditioning, dtype), **of_video}, cast(prompts.negative, dtype)
    prompts = replace(prompts, videos=prompts.videos if policy.takes_videos else None)
    if prompts.images is not None or prompts.videos is not None:
        shares = mesh.share(len(prompts) * group_size, config.rollout.micro_batch_size)
        rows = sorted({item // group_size for items in shares for item in items})
        for name, value in cast(media_conditioning(prompts, rows, policy, config), dtype).items():
            conditioning[name] = value.new_zeros(len(prompts), *value.shape[1:])  # untouched pages take no memory
            conditioning[name][rows] = value
    return replace(prompts, conditioning=conditioning, negative=negative)


def media_conditioning(prompts: PromptBatch, rows: Sequence[int], policy: Policy, config: Config) -> dict[str, Tensor]:
    """Conditioning from the images or control videos of these prompts, one video in memory at a time."""
    images = None if prompts.images is None else prompts.images[rows]
    if prompts.videos is None:
        assert images is not None
        return policy.image_conditioning(images, config.video)
    found = []
    for place, row in enumerate(rows):
        frames = read_clip(prompts.videos[row], 0.0, config.video, f"the video of prompt {prompts.texts[row]!r}")
        image = None if images is None else images[place : place + 1]
        found.append(policy.control_conditioning(frames[None], image, config.video))
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}
