"""The job that a plan is made for: a recipe on a number of GPUs, and the numbers of its training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import Any

import torch
import yaml

from bpgo_video.config.bpgo import Config
from bpgo_video.config.rules import check_world
from bpgo_video.distributed.ds_config import compute_dtype, fetching_ahead
from bpgo_video.planning.footprint import Footprint, Weights, Work, decoding, footprint
from bpgo_video.planning.models import Model, policy_of
from bpgo_video.planning.rewards import RewardSize, reward_size
from bpgo_video.planning.zero import Zero
from bpgo_video.policies import Policy
from bpgo_video.policies.base import LatentShape
from bpgo_video.rollouts.forwards import expected_forwards, expected_replays


@dataclass(frozen=True)
class Job:
    """A recipe on a number of GPUs.

    Attributes:
        stated_reward: of the reward models on the policy's GPUs; None takes what is known of the recipe's models.
        gigabytes: of one GPU; decides whether `rollout.parameters: auto` gathers.
        prompts: number of each split, where the shards are here.
    """

    config: Config
    ds_config: Mapping[str, Any]
    ranks: int
    model: Model
    stated_reward: RewardSize | None = None
    gigabytes: int = 80
    prompts: Mapping[str, int] = field(default_factory=dict)

    @property
    def gpus(self) -> str:
        """Their number in words."""
        return "1 GPU" if self.ranks == 1 else f"{self.ranks} GPUs"

    @cached_property
    def zero(self) -> Zero:
        """With the limits of stage 3 that the engine derives from the model."""
        zero = Zero.of(self.ds_config, self.ranks)
        if zero.stage < 3:
            return zero
        return Zero.of(fetching_ahead(self.ds_config, self.weights.largest_block), self.ranks)

    @cached_property
    def reward(self) -> RewardSize:
        return reward_size(self.config) if self.stated_reward is None else self.stated_reward

    @property
    def guided(self) -> bool:
        """Whether a forward computes both halves of classifier-free guidance."""
        sampler = self.config.sampler
        return max(sampler.guidance_scale, sampler.guidance_scale_2 or 1) > 1

    @cached_property
    def policy(self) -> Policy:
        """The family's policy without networks."""
        return policy_of(self.model, self.config.policy.family, self.config.policy.max_sequence_length)

    @cached_property
    def latents(self) -> LatentShape:
        """The latents that are sampled and recorded."""
        return self.policy.latent_shape(self.config.video)

    @property
    def decoded(self) -> tuple[int, ...]:
        """The shape of one sample that the VAE decodes."""
        return self.policy.decoded_shape(self.policy.video_shape(self.config.video))

    @property
    def samples(self) -> int:
        """Of a training step on one rank; the ranks of a sequence group make the same."""
        rollout = self.config.rollout
        return rollout.prompts_per_step * rollout.group_size // (self.ranks // self.config.parallel.sequence)

    @property
    def decoded_at_once(self) -> int:
        """Videos that a rank decodes together: a micro-batch's, or its part of a few in a sequence group."""
        micro, sequence = self.config.rollout.micro_batch_size, self.config.parallel.sequence
        return micro * (sequence // gcd(sequence, micro)) // sequence

    @cached_property
    def footprint(self) -> Footprint:
        """Of one of the model's transformers; of several, one computes at a time."""
        return self.footprint_of(checkpointed=self.config.policy.checkpointed)

    def footprint_of(self, *, checkpointed: float, blocks: int | None = None) -> Footprint:
        """`footprint` with another share of recomputed blocks, or of a transformer with fewer blocks."""
        return footprint(
            self.policy,
            self.config.video,
            self.config.rollout.micro_batch_size * (1 + self.guided),
            compute_dtype(self.ds_config),
            checkpointed=checkpointed,
            blocks=blocks,
            lora=self.config.policy.lora,
            sequence=self.config.parallel.sequence,
        )

    @property
    def vae_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.policy.vae_dtype)
        return dtype

    @cached_property
    def decoding(self) -> Work:
        """Of the videos that a rank decodes together."""
        policy = self.config.policy
        split = {"tiling": policy.vae_tiling, "slicing": policy.vae_slicing}
        return decoding(self.policy, self.decoded, self.decoded_at_once, dtype=self.vae_dtype, **split)

    @cached_property
    def differentiated(self) -> Work | None:
        """Of one video's decoding and its backward, if the objective follows the gradient of the rewards."""
        if self.config.loss.objective != "draft":
            return None
        tiling = self.config.policy.vae_tiling
        return decoding(self.policy, self.decoded, 1, dtype=self.vae_dtype, tiling=tiling, backward=True)

    @cached_property
    def weights(self) -> Weights:
        """Of all transformers; those that are not trained have no adapters."""
        one, names = self.footprint.weights, self.model.transformers
        trained = len(self.config.policy.trained or names)
        published = one.frozen if self.config.policy.lora.rank else one.trained
        frozen = one.frozen * trained + published * (len(names) - trained)
        return Weights(one.trained * trained, frozen, one.largest_block)


def count_step(job: Job) -> dict[str, Any]:
    """Numbers of a step: of groups that share a video, of videos, and of forwards and backwards on each rank.

    `forwards` and `passes` are those of `rollouts.forwards`, the latter for each update; `latents` are
    channels, frames, height, width; parameters are elements of all transformers.

    Raises:
        ConfigError: the batch does not divide over the ranks, or the policy cannot make the video.
    """
    check_world(job.config, job.ranks)
    rollout = job.config.rollout
    groups, micro_batches = job.ranks // job.config.parallel.sequence, job.samples // rollout.micro_batch_size
    return {
        "ranks": job.ranks,
        "groups": groups,
        "samples": rollout.prompts_per_step * rollout.group_size,
        "samples_per_group": job.samples,
        "micro_batches": micro_batches,
        "forwards": expected_forwards(job.config, groups),
        "passes": expected_replays(job.config, groups),
        "latents": job.latents,
        "parameters": job.weights.elements,
        "trained": sum(job.weights.trained),
    }


def change(job: Job, words: str) -> Job:
    """The job with one setting of its recipe, or of its DeepSpeed JSON, changed: `policy.vae_tiling: true`."""
    name, _, value = words.replace(":", "", 1).partition(" ")
    root = "ds_config" if name.startswith("zero_optimization") else "config"
    path = ["ranks"] if name == "--gpus" else [root, *name.split(".")]
    changed: Job = _with(job, path, yaml.safe_load(value))
    return changed


def _with(node: Any, path: Sequence[str], value: Any) -> Any:
    name, *inner = path
    if inner:
        value = _with(node[name] if isinstance(node, dict) else getattr(node, name), inner, value)
    return {**node, name: value} if isinstance(node, dict) else replace(node, **{name: value})


def readable(size: int) -> str:
    """Bytes in the unit of a GPU's size, or in MB below 1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
