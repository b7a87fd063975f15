"""Held-out scores of a policy folder, as training measures them, in a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.evaluation.tables import text_table
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned
from bpgo_video.training.heldout import HeldoutScores, Scores, evaluate, stderr
from bpgo_video.training.policy_session import sampling_policy
from bpgo_video.training.session import check_inputs, heldout_prompts
from bpgo_video.types import PromptBatch
from bpgo_video.zero import engine


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Scores of one policy on held-out prompts, the same on every rank.

    Attributes:
        config: the recipe with the requested changes.
        prompts: axis 0 of the scores.
        tags: of each prompt.
        versions: of each reward.
    """

    config: Config
    prompts: PromptBatch
    tags: tuple[tuple[str, ...], ...]
    versions: Mapping[str, str]
    scores: HeldoutScores


def asked(
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
    tags = {record.id: record.tags for record in shards.records(config.evaluation.split)}
    suite = RewardSuite(config.evaluation.rewards, mesh.device, config.video.fps)
    dtype = engine.compute_dtype(ds_config)
    policy = sampling_policy(config, ds_config, mesh)
    prompts = heldout_prompts(config, shards, policy)
    assert prompts is not None  # `asked` has checked that there are rewards
    prompts = conditioned(prompts, policy, config, dtype, mesh, config.evaluation.samples_per_prompt)
    scores = evaluate(policy, prompts, suite, config, mesh)
    return HeldoutEvaluation(config, prompts, tuple(tags[id_] for id_ in prompts.ids.tolist()), suite.versions, scores)


def by_tag(scores: Scores, tags: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Mean, standard error (None where it needs more samples) and number of prompts: of all, then of each tag."""
    found = {}
    for tag in ("all", *sorted({tag for own in tags for tag in own})):
        part = scores[torch.tensor([tag in ("all", *own) for own in tags])]
        error = stderr(part) if part.numel() > 1 else math.nan
        mean = float(part.double().mean())
        found[tag] = {"mean": mean, "stderr": error if math.isfinite(error) else None, "prompts": len(part)}
    return found


def as_json(evaluation: HeldoutEvaluation) -> dict[str, Any]:
    """Settings, summary by reward and tag, and every score, as plain JSON data."""
    config, prompts, by_name = evaluation.config, evaluation.prompts, evaluation.scores.by_name
    settings = ("samples_per_prompt", "num_steps", "guidance_scale", "guidance_scale_2")
    return {
        "policy": config.policy.folder,
        "shards": config.data.shards,
        "split": config.evaluation.split,
        "seed": config.run.seed,
        **{name: getattr(config.evaluation, name) for name in settings},
        "rewards": {
            name: {"version": evaluation.versions[name], "by_tag": by_tag(scores, evaluation.tags)}
            for name, scores in by_name.items()
        },
        "prompts": [
            {
                "id": id_,
                "prompt": prompts.texts[row],
                "tags": list(evaluation.tags[row]),
                "scores": {name: scores[row].tolist() for name, scores in by_name.items()},
            }
            for row, id_ in enumerate(prompts.ids.tolist())
        ],
    }


def as_table(evaluation: HeldoutEvaluation) -> str:
    """A row for each reward and tag: mean, standard error, prompts, videos."""
    config, rows = evaluation.config, []
    for name, scores in evaluation.scores.by_name.items():
        for tag, cell in by_tag(scores, evaluation.tags).items():
            error = "n/a" if cell["stderr"] is None else f"{cell['stderr']:.4f}"
            counts = [f"{cell['prompts'] * videos:,}" for videos in (1, config.evaluation.samples_per_prompt)]
            rows.append([name, tag, f"{cell['mean']:.4f}", error, *counts])
    title, header = f"{config.policy.folder}, split {config.evaluation.split}", ("reward", "tag", "mean", "± stderr")
    return text_table(title, [*header, "prompts", "videos"], rows, words=2)
