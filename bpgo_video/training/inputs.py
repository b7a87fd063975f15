"""A run's inputs, checked on every rank before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bpgo_video
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.deepspeed import read_ds_config, zero_stage
from bpgo_video.config.reading import ds_config_file
from bpgo_video.config.rules import check_rules
from bpgo_video.config.sft import Recipe, SftConfig
from bpgo_video.data.priors import prior_path, require_priors
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import LATENTS, ShardError, encoder_stamp
from bpgo_video.data.stream import EndlessOrder
from bpgo_video.data.writer import clip_stamp, image_stamp
from bpgo_video.distributed import engine as engines
from bpgo_video.distributed.mesh import Mesh, all_or_none, same_everywhere
from bpgo_video.files import fingerprint, resolve_folder
from bpgo_video.learner.priors import FROM_IMAGES, STORED
from bpgo_video.policies import Policy, family, load_policy
from bpgo_video.policies.attention import check_heads
from bpgo_video.policies.attention_backends import ODE_KEY, check_backend
from bpgo_video.policies.networks import (
    component_of,
    parts_of,
    trained_names,
    transformer_names,
)
from bpgo_video.rewards.base import listens
from bpgo_video.rewards.groups import groupwise_names
from bpgo_video.rewards.reward import reward_factory
from bpgo_video.rollouts.prefixes import spreads
from bpgo_video.rollouts.prior_sampling import reads_priors
from bpgo_video.rollouts.rules import check_experts
from bpgo_video.training.trackers import check_trackers
from bpgo_video.weights import read_json

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers")  # a run's numbers depend on their versions
Inputs = tuple[dict[str, Any], PromptShards]  # the DeepSpeed configuration and the shards


def check_inputs(config: Recipe, mesh: Mesh, need_priors: bool = True) -> Inputs:
    """Check everything that can be checked before a model is loaded, and that all ranks read the same inputs.

    Raises:
        ConfigError, ShardError, FileNotFoundError: on every rank; with the value, the rule and the way out.
    """
    with all_or_none(mesh):
        if mesh.is_main:
            check_trackers(config)
        ds_config, shards = read_common_inputs(config)
        if isinstance(config, SftConfig):
            check_clips(config, shards)
            priors = []
        else:
            check_prompts(config, shards)
            priors = list(config.trained_rewards) if need_priors and reads_priors(config) else []
            require_priors(shards.directory, priors)
        identity = run_identity(config, ds_config, shards)
        identity["priors"] = "".join(prior_path(shards.directory, name).read_bytes().hex() for name in priors)
    same_everywhere(identity, mesh)
    return ds_config, shards


def read_common_inputs(config: Recipe) -> tuple[dict[str, Any], PromptShards]:
    """The DeepSpeed configuration and the shards, checked on this rank against the policy's folder."""
    ds_config = read_ds_config(str(ds_config_file(config.deepspeed)))
    engines.require_supported(ds_config)
    if config.optim.average == "update" and zero_stage(ds_config) == 2:
        raise ConfigError(
            f"optim.average is 'update', but {config.deepspeed} sets stage 2, which averages gradients after each "
            "micro-batch; set zero_optimization.stage to 1, which averages once an update, or to 3"
        )
    check_backend(config.policy.attention_backend, trains=True)
    folder = resolve_folder(config.policy.folder)
    policy_class = family(folder, config.policy.family)
    for name in trained_names(folder, config.policy.trained):
        transformer = read_json(folder / name / "config.json")
        check_heads(transformer, config.parallel.sequence, policy_class.sequence_plan)
    shards = PromptShards(config.data.shards, config.data.cache)
    shards.check_policy(encoder_stamp(folder, config.policy.max_sequence_length))
    if policy_class.texts_see_images:
        shards.check_stamp(image_stamp(folder, (config.video.height, config.video.width)))
    return ds_config, shards


def run_identity(config: Recipe, ds_config: Mapping[str, Any], shards: PromptShards) -> dict[str, str]:
    """Everything that a run's numbers depend on, as text by name."""
    folder = resolve_folder(config.policy.folder)
    decoders = [part for part in parts_of(folder) if component_of(part) == "vae"]
    code = sorted(Path(bpgo_video.__file__).parent.rglob("*.py"))
    return {
        **{f"{name} section": repr(section) for name, section in vars(config).items()},
        "DeepSpeed configuration": repr(ds_config),
        "prompt shards": repr(shards.index),
        "model": fingerprint(folder, (*transformer_names(folder), *decoders)),
        "bpgo_video code": "".join(path.read_text("utf-8") for path in code),
        "package versions": repr({name: version(name) for name in PACKAGES}),
    }


def check_prompts(config: Config, shards: PromptShards) -> None:
    """Check rewards, splits, video size, trained steps and images of a run on rewards."""
    every = {**config.rewards, **config.evaluation.rewards}.items()
    listeners = [name for name, reward in every if listens(reward_factory(name, reward))]
    check_group_rewards(config)
    splits = [config.data.split, *([config.evaluation.split] if config.evaluation.rewards else [])]
    for split in splits:
        shards.rows(split)
    check_backend(config.rollout.attention_backend, trains=False, key=ODE_KEY)
    policy = describe_policy(config)
    policy.latent_shape(config.video)  # raises for a video size that the family cannot make
    check_experts(policy, config)
    check_audio(config, policy.makes_audio, listeners)
    check_images(config, policy.takes_images, shards, splits)
    for split in splits if policy.takes_videos else ():
        if not shards.has_videos(split):
            raise ConfigError(
                f"{config.policy.folder} makes videos that follow a video, but the prompts of split {split!r} of "
                f"{config.data.shards} have none; build the shards from .jsonl lines with a 'video'"
            )


def check_audio(config: Config, makes_audio: bool, listeners: Sequence[str]) -> None:
    """Check that rewards which listen have sound, and that credit by frames has latents of frames alone.

    Raises:
        ConfigError: names the reward, or the setting.
    """
    if listeners and not makes_audio:
        raise ConfigError(
            f"rewards.{listeners[0]} listens, but {config.policy.folder} makes silent videos; remove the reward, or "
            "take a policy that makes sound (LTX-2)"
        )
    if makes_audio and config.credit.kind == "segment":
        raise ConfigError(
            f"credit.kind is 'segment', but {config.policy.folder} samples video and sound as one row of tokens, not "
            "as frames; set credit.kind to 'video'"
        )


def check_group_rewards(config: Config) -> None:
    """Check that rewards which compare the samples of a prompt are used where that has a meaning.

    Raises:
        ConfigError: names the reward, and the setting.
    """
    said = "which compares the samples of a prompt with each other"
    if names := groupwise_names(config.evaluation.rewards):
        raise ConfigError(
            f"evaluation.rewards.{names[0]} is {config.evaluation.rewards[names[0]].model}, {said}: its mean is the "
            "same for every policy; hold out a reward that scores single videos"
        )
    names, kind = groupwise_names(config.trained_rewards), config.prior.kind
    if names and config.needs_prior and kind in (*STORED, *FROM_IMAGES):
        raise ConfigError(
            f"rewards.{names[0]} is {config.rewards[names[0]].model}, {said}, and prior.kind is {kind!r}, which scores "
            "the starting policy's samples or an image alone; set prior.kind to 'ema', or to 'constant' with "
            "prior.mean 0.5"
        )


def check_whole_groups(config: Config, mesh: Mesh) -> None:
    """Check that each rank has all samples of its prompts, if a reward compares them.

    Raises:
        ConfigError: names the reward, and the setting that spreads a prompt's samples over ranks.
    """
    rollout, ranks, names = config.rollout, mesh.data_size, groupwise_names(config.rewards)
    if not names:
        return
    needs = f"rewards.{names[0]} compares the samples of a prompt, which must be on one rank, but"
    apart = (
        rollout.same_start
        and not rollout.branches
        and spreads(mesh, rollout.group_size, rollout.micro_batch_size)
        and not describe_policy(config).takes_images
    )
    check_rules(
        {
            f"{needs} parallel.sequence = {mesh.sequence} decodes them on so many; set parallel.sequence to 1, or take "
            "a reward that scores single videos (vlm_judge)": mesh.sequence > 1,
            f"{needs} rollout.prompts_per_step = {rollout.prompts_per_step} does not divide over {ranks} ranks; set it "
            f"to a multiple of {ranks}": rollout.prompts_per_step % ranks,
            f"{needs} rollout.same_start with group_size = {rollout.group_size} and micro_batch_size = "
            f"{rollout.micro_batch_size} spreads them over {ranks} ranks; set rollout.same_start to false": apart,
        }
    )


def check_images(config: Config, takes_images: bool, shards: PromptShards, splits: Sequence[str]) -> None:
    """Check that prompts have images where the policy or the prior needs them.

    Raises:
        ConfigError: they have none; names the policy or the prior, and the split.
        ShardError: only some prompts of a split have an image.
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


def check_clips(config: SftConfig, shards: PromptShards) -> None:
    """Check that the shards hold clips of the recipe's video size, encoded by this policy's VAE, in its splits.

    Raises:
        ShardError: names the difference and the command to run.
    """
    shards.require_clips()
    folder = resolve_folder(config.policy.folder)
    takes_images = family(folder, config.policy.family).takes_images
    shards.check_stamp(clip_stamp(folder, config.video, takes_images))
    if takes_images != (set(shards.clip) != {LATENTS}):
        raise ShardError(
            f"{shards.directory} holds {sorted(shards.clip)} of each clip, but {config.policy.folder} makes videos of "
            f"{'images' if takes_images else 'texts alone'}: build shards for it with bpgo-video videos build"
        )
    EndlessOrder(shards, config.data.split, config.run.seed, config.sft.batch_size)
    if config.evaluation.split is not None:
        shards.rows(config.evaluation.split)


def heldout_rows(config: Config, shards: PromptShards) -> list[int]:
    """Rows of the held-out prompts: at most `evaluation.max_prompts`, evenly spread over the split."""
    return spread_rows(shards, config.evaluation.split, config.evaluation.max_prompts).tolist()


def spread_rows(shards: PromptShards, split: str | None, most: int) -> np.ndarray:
    """At most `most` rows of a split, evenly spread over it; none without a split."""
    if split is None:
        return np.empty(0, dtype=np.int64)
    rows = shards.rows(split)
    count = min(len(rows), most)
    return rows[np.arange(count) * len(rows) // count]


def describe_policy(config: Recipe) -> Policy:
    """The recipe's policy without any network."""
    return recipe_policy(config, components=())


def recipe_policy(config: Recipe, **arguments: Any) -> Policy:
    policy = config.policy
    arguments |= {"max_sequence_length": policy.max_sequence_length, "name": policy.family, "options": policy.options}
    return load_policy(policy.folder, vae_dtype=getattr(torch, policy.vae_dtype), **arguments)
