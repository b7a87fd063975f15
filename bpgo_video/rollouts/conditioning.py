"""What is the transformer conditioned on? Texts, images, and what the family tells it of the video itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.data.reader import PromptShards
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.priors import FROM_IMAGES
from bpgo_video.policies import Policy
from bpgo_video.types import Conditioning, PromptBatch


def cast(conditioning: Conditioning, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Embeddings in `dtype`, masks of tokens as they are."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in conditioning.items()
    }


def for_each(row: Conditioning, count: int) -> dict[str, Tensor]:
    """The one row, for `count` samples."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in row.items()}


def image_size(config: Config, policy: Policy) -> tuple[int, int] | None:
    """Height and width at which prompts' images are read; None where the policy takes none."""
    return (config.video.height, config.video.width) if policy.takes_images else None


def check_images(config: Config, takes_images: bool, shards: PromptShards, splits: Sequence[str]) -> None:
    """Whether the prompts have what the policy continues, and the prior what it scores.

    Args:
        takes_images: the policy does; asked before it is loaded.

    Raises:
        ConfigError: names the policy or the prior, and the split.
        ShardError: some prompts of a split have an image and some have none.
    """
    if not takes_images:
        if config.prior.kind in FROM_IMAGES:
            raise ConfigError(
                f"prior.kind is {config.prior.kind!r}, which scores the images that videos continue, but "
                f"{config.policy.folder} makes videos of texts; set prior.kind to 'reference' or 'ema'"
            )
        return
    for split in splits:
        if not shards.has_images(split):
            raise ConfigError(
                f"{config.policy.folder} makes videos of images, but the prompts of split {split!r} of "
                f"{config.data.shards} have none; build the shards from .jsonl lines with an 'image'"
            )


def conditioned(
    prompts: PromptBatch,
    policy: Policy,
    config: Config,
    dtype: torch.dtype,
    mesh: Mesh,
    group_size: int,
) -> PromptBatch:
    """The prompts with all that the policy is conditioned on, resting on the CPU.

    An image costs the encoding of a whole video: each rank encodes those of its own share of the samples, and the rows
    of the others stay empty.

    Args:
        group_size: samples of each prompt that are to be made.
    """
    told = for_each(policy.video_conditioning(config.video), len(prompts))
    own_texts = {**cast(prompts.conditioning, dtype), **told}
    prompts = replace(prompts, conditioning=own_texts, negative=cast(prompts.negative, dtype))
    if prompts.images is None:
        return prompts
    shares = mesh.share(len(prompts) * group_size, config.rollout.micro_batch_size)
    rows = sorted({item // group_size for items in shares for item in items})
    found = cast(policy.image_conditioning(prompts.images[rows], config.video), dtype)
    own = {name: _in_rows(value, rows, len(prompts)) for name, value in found.items()}
    return replace(prompts, conditioning={**prompts.conditioning, **own})


def _in_rows(values: Tensor, rows: Sequence[int], count: int) -> Tensor:
    whole = values.new_zeros(count, *values.shape[1:])  # untouched pages take no memory
    whole[list(rows)] = values
    return whole
