"""The reference prior of arXiv 2511.18919: the starting policy's mean reward on each prompt, and its scale s_ref."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.data.priors import UnfinishedPriors, write_priors
from bpgo_video.data.stream import as_batch
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.mesh import Mesh, from_main
from bpgo_video.files import fingerprint
from bpgo_video.policies import Policy
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.rollouts.rollout import sampled_steps, training_denoiser
from bpgo_video.training.heldout import score_samples
from bpgo_video.training.session import check_inputs, sampling_policy
from bpgo_video.types import PriorAnchor, PromptBatch, Rewards

PROMPTS_AT_ONCE = 64  # gathered and saved together


def estimate(config: Config, mesh: Mesh) -> dict[str, Float[Tensor, "prompts samples"]]:
    """Score the starting policy on all prompts of the training split; rank 0 writes the priors.

    An interrupted estimation with the same settings continues with the prompts that are missing.

    Returns:
        Scores by reward name.

    Raises:
        ConfigError: a reward gives all samples of every prompt the same score.
    """
    ds_config, shards = check_inputs(config, mesh, need_priors=False)
    suite = RewardSuite(config.rewards, mesh.device, config.video.fps)
    policy = sampling_policy(config, ds_config, mesh)
    policy_hash = fingerprint(policy.folder, policy.transformer_names)
    notes = UnfinishedPriors(shards.directory, settings_of(config, suite.versions, policy_hash))
    known = from_main(notes.begin() if mesh.is_main else {}, mesh)
    rows = shards.rows(config.data.split)
    ids = shards.ids(rows).tolist()
    missing = [row for row, prompt in zip(rows.tolist(), ids, strict=True) if prompt not in known]
    dtype, done = compute_dtype(ds_config), len(ids) - len(missing)
    with tqdm(total=len(ids), initial=done, desc="priors", unit="prompt", disable=not mesh.is_main) as bar:
        for start in range(0, len(missing), PROMPTS_AT_ONCE):
            records = [shards.record(row) for row in missing[start : start + PROMPTS_AT_ONCE]]
            batch = as_batch(records, image_size(config, policy))
            batch = conditioned(batch, policy, config, dtype, mesh, config.prior.samples)
            by_name = score_prompts(config, policy, batch, suite, mesh).by_name
            new = {
                prompt: {name: scores[row].tolist() for name, scores in by_name.items()}
                for row, prompt in enumerate(batch.ids.tolist())
            }
            known |= new
            if mesh.is_main:
                notes.add(new)
            bar.update(len(batch))
    scores = {name: torch.tensor([known[prompt][name] for prompt in ids]) for name in suite.versions}
    anchors = {name: measured(name, scores[name], version) for name, version in suite.versions.items()}
    if mesh.is_main:
        for name, anchor in anchors.items():
            store(shards.directory, name, anchor, policy_hash, ids)
        notes.remove()
    mesh.barrier()
    return scores


def settings_of(config: Config, versions: Mapping[str, str], policy_hash: str) -> dict[str, str]:
    """Everything that the scores depend on, as text."""
    sections = {name: repr(getattr(config, name)) for name in ("policy", "video", "sampler", "data")}
    draws = f"seed {config.run.seed}, {config.prior.samples} samples"
    return {**sections, "rewards": repr(dict(versions)), "policy hash": policy_hash, "draws": draws}


def score_prompts(config: Config, policy: Policy, prompts: PromptBatch, suite: RewardSuite, mesh: Mesh) -> Rewards:
    """Score `prior.samples` videos per prompt, made by the training sampler with noise that no training step draws."""
    steps = sampled_steps(policy, config, step=-1)(0)  # the same for all prompts: a micro-batch may hold several
    denoiser = training_denoiser(policy, config)
    return score_samples(denoiser, prompts, suite, config, mesh, config.prior.samples, "prior", lambda prompt: steps)


def measured(name: str, scores: Float[Tensor, "prompts samples"], version: str) -> PriorAnchor:
    """The anchor of a reward's scores; raises ConfigError if they have no deviation to scale by."""
    try:
        return PriorAnchor.of_samples(scores, version)
    except ValueError as error:
        raise ConfigError(f"reward {name!r}: {error}; it cannot tell the samples apart, use another reward") from error


def store(directory: Path, name: str, anchor: PriorAnchor, policy_hash: str, ids: Sequence[int]) -> None:
    """Write the anchors of one reward, and print a summary."""
    rows = zip(anchor.mean.tolist(), anchor.std.tolist(), anchor.count.tolist(), strict=True)
    path = write_priors(directory, name, anchor.version, anchor.scale, policy_hash, dict(zip(ids, rows, strict=True)))
    mean, samples = float(anchor.mean.mean()), int(anchor.count[0])
    print(f"{path}: {len(ids)} prompts x {samples} samples, mean {mean:.4f}, s_ref {anchor.scale:.4f}")
