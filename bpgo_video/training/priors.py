"""`bpgo-video priors`: the starting policy's rewards on each prompt, before training.

The reference prior of arXiv 2511.18919 is the starting policy's mean reward on each prompt, and its scale s_ref.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from more_itertools import chunked
from tqdm import tqdm

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.deepspeed import zero_stage
from bpgo_video.config.rules import OWNER
from bpgo_video.data.priors import (
    Anchor,
    PriorTable,
    Scores,
    UnfinishedPriors,
    extensible_anchors,
    prior_path,
    write_priors,
)
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.stream import as_batch
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_main
from bpgo_video.files import fingerprint, resolve_folder
from bpgo_video.learner.priors import pooled_scale, reference_moments
from bpgo_video.policies import Policy
from bpgo_video.policies.networks import transformer_names
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.prior_sampling import (
    as_sampled,
    prior_groups,
    prompts_per_round,
    rows_to_measure,
    steps_of_group,
)
from bpgo_video.training.heldout import score_samples
from bpgo_video.training.inputs import check_inputs
from bpgo_video.training.lease import Lease
from bpgo_video.training.session import frozen_policy, rollout_weights
from bpgo_video.types import PromptBatch, Rewards


def estimate_priors(config: Config, mesh: Mesh, heartbeat: Heartbeat) -> dict[str, PriorTable]:
    """Measure the anchors that a run of the recipe needs and the stored tables lack; rank 0 writes the tables.

    Stored anchors of the same settings stay, and those of other settings are replaced. An interrupted measurement
    continues with the groups that are missing.

    Returns:
        The tables, by reward name.

    Raises:
        ConfigError: a reward gives all samples of every group the same score.
        OwnedError: another launch measures priors of these prompts.
    """
    ds_config, shards = check_inputs(config, mesh, need_priors=False)
    folder = shards.directory / "priors"
    with Lease(folder / OWNER) as lease:
        lease.on_loss = heartbeat.abort
        with all_or_none(mesh):
            if mesh.is_main:
                folder.mkdir(exist_ok=True)
                lease.acquire()
        return _estimate(config, mesh, ds_config, shards, lease)


def _estimate(
    config: Config, mesh: Mesh, ds_config: Mapping[str, Any], shards: PromptShards, lease: Lease
) -> dict[str, PriorTable]:
    suite = RewardSuite(config.trained_rewards, mesh.device, config.video.fps)
    folder = resolve_folder(config.policy.folder)
    policy_hash = fingerprint(folder, transformer_names(folder))
    settings = settings_of(config, ds_config, suite.versions, policy_hash)
    unfinished = UnfinishedPriors(shards.directory, settings)
    with all_or_none(mesh):
        found = None
        if mesh.is_main:
            found = extensible_anchors(shards.directory, list(suite.versions), settings), unfinished.begin()
    (stored, replaced), scores = from_main(found, mesh)  # type: ignore[misc]
    rows = rows_to_measure(config, shards)
    ids = shards.ids(np.array(rows)).tolist()
    missing = [row for row, id_ in zip(rows, ids, strict=True) if id_ not in stored]
    if mesh.is_main:
        which = "that the run visits" if config.prior.prompts == "visited" else f"of split {config.data.split!r}"
        again = f"; {replaced}, and will be replaced" if replaced else ""
        print(f"{len(missing)} of the {len(rows)} prompts {which} have no anchors of these settings{again}", flush=True)

    def save(new: Scores) -> None:
        lease.check()
        if mesh.is_main:
            unfinished.add(new)

    if missing:
        scores |= score_missing(config, mesh, ds_config, shards, suite, missing, scores, save)
    anchors = {**stored, **anchors_of(scores, prior_groups(config)[0])}
    tables = {
        name: table_of(name, version, policy_hash, settings, {id_: anchors[id_][name] for id_ in sorted(anchors)})
        for name, version in suite.versions.items()
    }
    lease.check()
    if mesh.is_main:
        for name, table in tables.items():
            if len(anchors) > len(stored):
                write_priors(shards.directory, table)
            print(f"{prior_path(shards.directory, name)}: {described(table)}")
        unfinished.remove()
    mesh.barrier()
    return tables


def settings_of(
    config: Config, ds_config: Mapping[str, Any], versions: Mapping[str, str], policy_hash: str
) -> dict[str, str]:
    """Everything that the scores depend on, as text. Ranks and micro-batches change no more than their last bits."""
    sampled, policy = as_sampled(config), config.policy
    dtypes = (compute_dtype(ds_config), policy.vae_dtype)
    network = (policy.family, policy.max_sequence_length, policy.trained, policy.options, *dtypes)
    groups, size = prior_groups(config)
    shortcuts = (config.rollout.guidance_every, config.rollout.attention_backend)
    return {
        "policy": f"{policy_hash} {network}",
        "video": repr(config.video),
        "sampler": f"{sampled.sampler} {shortcuts}{'' if config.loss.replays_transitions else ' no stochastic steps'}",
        "rewards": repr(dict(versions)),
        "draws": f"{groups} groups of {size}, rollout.same_start {config.rollout.same_start}",
    }


def score_missing(
    config: Config,
    mesh: Mesh,
    ds_config: Mapping[str, Any],
    shards: PromptShards,
    suite: RewardSuite,
    rows: Sequence[int],
    scored: Scores,
    save: Callable[[Scores], None],
) -> Scores:
    """Sample and score the groups of these prompts that are not scored yet.

    Args:
        save: receives the scores of a round as soon as they are gathered, on every rank.
    """
    policy, dtype, sampled = frozen_policy(config, ds_config, mesh), compute_dtype(ds_config), as_sampled(config)
    (groups, size), together = prior_groups(config), prompts_per_round(config, mesh.world_size)
    ids = dict(zip(rows, shards.ids(np.array(rows)).tolist(), strict=True))
    missing = {group: [row for row in rows if (ids[row], group) not in scored] for group in range(groups)}
    found: Scores = {}
    done = groups * len(rows) - sum(map(len, missing.values()))
    total, shown = groups * size * len(rows), mesh.is_main
    with (
        rollout_weights(config, policy.transformers, zero_stage(ds_config), mesh),
        tqdm(total=total, initial=done * size, desc="priors", unit="video", disable=not shown) as bar,
    ):
        rounds = ((group, part) for group, left in missing.items() for part in chunked(left, together))
        for group, part in rounds:
            batch = as_batch([shards.record(row) for row in part], image_size(config, policy))
            batch = conditioned(batch, policy, sampled, dtype, mesh, size)
            by_name = score_group(sampled, policy, batch, suite, mesh, group).by_name
            new = {
                (id_, group): {name: values[row].tolist() for name, values in by_name.items()}
                for row, id_ in enumerate(batch.ids.tolist())
            }
            save(new)
            found |= new
            bar.update(len(batch) * size)
    return found


def score_group(
    sampled: Config, policy: Policy, prompts: PromptBatch, suite: RewardSuite, mesh: Mesh, group: int
) -> Rewards:
    """Score a group of each prompt, sampled as in training, with noise that no training step draws."""
    denoiser = replace(training_denoiser(policy, sampled), records_path=False, records_means=False)
    return score_samples(
        denoiser,
        prompts,
        suite,
        sampled,
        mesh,
        prior_groups(sampled)[1],
        ("prior", group),
        steps_of_group(policy, sampled, group),
        sampled.rollout.same_start,
    )


def anchors_of(scores: Scores, groups: int) -> dict[int, dict[str, Anchor]]:
    """The anchors by reward of the prompts of which all groups are scored."""
    anchors: dict[int, dict[str, Anchor]] = {}
    for id_ in {id_ for id_, _ in scores}:
        of_prompt = [scores[id_, group] for group in range(groups) if (id_, group) in scores]
        if len(of_prompt) == groups:
            by_name = {name: torch.tensor([scored[name] for scored in of_prompt]) for name in of_prompt[0]}
            anchors[id_] = {name: reference_moments(rewards) for name, rewards in by_name.items()}
    return anchors


def table_of(
    name: str, version: str, policy: str, settings: Mapping[str, str], anchors: Mapping[int, Anchor]
) -> PriorTable:
    """The table of one reward. Raises ConfigError if its anchors have no deviation to scale by."""
    scale = pooled_scale(spread for _, _, _, spread in anchors.values())
    if not scale > 0:
        raise ConfigError(
            f"reward {name!r}: s_ref is {scale}, since all samples of a group earn the same on every prompt; it cannot "
            "tell the samples apart, use another reward"
        )
    return PriorTable(
        reward=name, version=version, scale=scale, policy=policy, settings=dict(settings), anchors=dict(anchors)
    )


def described(table: PriorTable) -> str:
    means = [mean for mean, _, _, _ in table.anchors.values()]
    return f"{len(means)} prompts, mean {sum(means) / len(means):.4f}, s_ref {table.scale:.4f}"
