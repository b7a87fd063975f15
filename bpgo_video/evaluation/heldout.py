"""Held-out scores of a policy folder, as training measures them, in a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.data.prompt_stream import as_batch
from bpgo_video.distributed import engine
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation.compare_scores import PromptLine, lines_of
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.training.heldout import evaluate, stderr
from bpgo_video.training.session import check_inputs, heldout_rows, sampling_policy
from bpgo_video.training.summary import boxed


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Scores of one policy on held-out prompts, the same on every rank.

    Attributes:
        config: the recipe with the requested changes.
        versions: of each reward.
        prompts: in order, with the scores of each reward.
    """

    config: Config
    versions: Mapping[str, str]
    prompts: Sequence[PromptLine]

    def by_tag(self, reward: str) -> dict[str, dict[str, Any]]:
        """Mean, standard error (None where it needs more samples) and number of prompts: of all, then of each tag."""
        found = {}
        for tag in ("all", *sorted({tag for line in self.prompts for tag in line.tags})):
            scores = torch.tensor([line.scores[reward] for line in self.prompts if tag in ("all", *line.tags)])
            error = stderr(scores) if scores.numel() > 1 else math.nan
            mean = float(scores.double().mean())
            found[tag] = {"mean": mean, "stderr": error if math.isfinite(error) else None, "prompts": len(scores)}
        return found


def with_changes(
    config: Config,
    *,
    policy: str | None = None,
    split: str | None = None,
    samples_per_prompt: int | None = None,
    seed: int | None = None,
) -> Config:
    """The recipe with these values instead of its own; None keeps a value.

    Raises:
        ConfigError: the recipe names no held-out rewards.
    """
    if not config.evaluation.rewards:
        raise ConfigError("evaluation.rewards is empty; name the rewards to score held-out prompts with in the recipe")
    own = config.evaluation
    evaluation = replace(own, split=split or own.split, samples_per_prompt=samples_per_prompt or own.samples_per_prompt)
    run = replace(config.run, seed=config.run.seed if seed is None else seed)
    folder = replace(config.policy, folder=policy or config.policy.folder)
    return replace(config, run=run, policy=folder, evaluation=evaluation)


def evaluate_folder(config: Config, mesh: Mesh) -> HeldoutEvaluation:
    """Scores `policy.folder` on the held-out prompts, with the noise of a training run's evaluations of this seed.

    Raises:
        ConfigError, ShardError, FileNotFoundError, RewardError: state the value, the rule and the way out.
    """
    ds_config, shards = check_inputs(config, mesh, need_priors=False)
    records = [shards.record(row) for row in heldout_rows(config, shards)]
    suite = RewardSuite(config.evaluation.rewards, mesh.device, config.video.fps)
    policy, dtype = sampling_policy(config, ds_config, mesh), engine.compute_dtype(ds_config)
    batch = as_batch(records, image_size(config, policy))
    prompts = conditioned(batch, policy, config, dtype, mesh, config.evaluation.samples_per_prompt)
    scores = evaluate(policy, prompts, suite, config, mesh)
    return HeldoutEvaluation(config, suite.versions, lines_of(records, scores.by_name))


def as_json(evaluation: HeldoutEvaluation) -> dict[str, Any]:
    """Settings, summary by reward and tag, and every score, as plain JSON data."""
    config, versions = evaluation.config, evaluation.versions
    settings = ("split", "samples_per_prompt", "num_steps", "guidance_scale", "guidance_scale_2")
    return {
        "policy": config.policy.folder,
        "shards": config.data.shards,
        "seed": config.run.seed,
        **{name: getattr(config.evaluation, name) for name in settings},
        "rewards": {name: {"version": versions[name], "by_tag": evaluation.by_tag(name)} for name in versions},
        "prompts": [asdict(line) for line in evaluation.prompts],
    }


def as_table(evaluation: HeldoutEvaluation) -> str:
    """A row for each reward and tag: mean, standard error, prompts, videos."""
    config, rows = evaluation.config, []
    for name in evaluation.versions:
        for tag, cell in evaluation.by_tag(name).items():
            error = "n/a" if cell["stderr"] is None else f"{cell['stderr']:.4f}"
            counts = [f"{cell['prompts'] * videos:,}" for videos in (1, config.evaluation.samples_per_prompt)]
            rows.append([name, tag, f"{cell['mean']:.4f}", error, *counts])
    header = ("reward", "tag", "mean", "± stderr", "prompts", "videos")
    return boxed(rows, header, words=2, title=f"{config.policy.folder}, split {config.evaluation.split}")
