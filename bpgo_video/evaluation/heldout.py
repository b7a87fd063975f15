"""How good is a policy folder on a recipe's held-out prompts? What training measures, for any folder, in a table."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned
from bpgo_video.training.heldout import HeldoutScores, Scores, evaluate, stderr
from bpgo_video.training.policy_session import sampling_policy
from bpgo_video.training.session import check_inputs, heldout_prompts
from bpgo_video.types import PromptBatch
from bpgo_video.zero import engine

ALL = "all"


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Scores of one policy on held-out prompts, the same on every rank.

    Attributes:
        config: the recipe with what was asked instead.
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
    """The recipe with these in place of its own; None keeps a value.

    Raises:
        ConfigError: the recipe names no held-out rewards.
    """
    if not config.evaluation.rewards:
        raise ConfigError("evaluation.rewards is empty; name the rewards to score held-out prompts with in the recipe")
    run, evaluation = config.run, config.evaluation
    return replace(
        config,
        run=replace(run, seed=run.seed if seed is None else seed),
        policy=replace(config.policy, folder=policy or config.policy.folder),
        evaluation=replace(
            evaluation,
            split=split or evaluation.split,
            samples_per_prompt=samples_per_prompt or evaluation.samples_per_prompt,
        ),
    )


def evaluate_folder(config: Config, mesh: Mesh) -> HeldoutEvaluation:
    """Score `policy.folder` on the held-out prompts with the noise that a training run of this seed evaluates with.

    Raises:
        ConfigError, ShardError, FileNotFoundError, RewardError: state the value, the rule and the way out.
    """
    ds_config, shards = check_inputs(config, mesh, need_priors=False)
    tags = {record.id: record.tags for record in shards.records(config.evaluation.split)}
    suite = RewardSuite(config.evaluation.rewards, mesh.device, config.video.fps)
    dtype = engine.compute_dtype(ds_config)
    policy = sampling_policy(config, ds_config, mesh)
    prompts = heldout_prompts(config, shards, policy)
    assert prompts is not None  # `asked` saw to it that there are rewards
    prompts = conditioned(prompts, policy, config, dtype, mesh, config.evaluation.samples_per_prompt)
    return HeldoutEvaluation(
        config=config,
        prompts=prompts,
        tags=tuple(tags[id_] for id_ in prompts.ids.tolist()),
        versions=suite.versions,
        scores=evaluate(policy, prompts, suite, config, mesh),
    )


def by_tag(scores: Scores, tags: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Mean, standard error (None where it needs more samples) and number of prompts: of all, then of each tag."""
    rows = {ALL: list(range(len(tags)))}
    for tag in sorted({tag for own in tags for tag in own}):
        rows[tag] = [row for row, own in enumerate(tags) if tag in own]
    found = {}
    for tag, chosen in rows.items():
        part = scores[torch.tensor(chosen)]
        error = stderr(part) if part.numel() > 1 else math.nan
        found[tag] = {
            "mean": float(part.double().mean()),
            "stderr": error if math.isfinite(error) else None,
            "prompts": len(chosen),
        }
    return found


def as_json(evaluation: HeldoutEvaluation) -> dict[str, Any]:
    """Settings, summary by reward and tag, and every score, as plain JSON data."""
    config, prompts = evaluation.config, evaluation.prompts
    by_name = evaluation.scores.by_name
    return {
        "policy": config.policy.folder,
        "shards": config.data.shards,
        "split": config.evaluation.split,
        "seed": config.run.seed,
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "num_steps": config.evaluation.num_steps,
        "guidance_scale": config.evaluation.guidance_scale,
        "guidance_scale_2": config.evaluation.guidance_scale_2,
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
    """A row per reward and tag: mean, standard error, prompts, videos."""
    config = evaluation.config
    table = Table(box=box.ROUNDED, title=f"{config.policy.folder}, split {config.evaluation.split}")
    table.add_column("reward")
    table.add_column("tag")
    for label in ("mean", "± stderr", "prompts", "videos"):
        table.add_column(label, justify="right")
    for name, scores in evaluation.scores.by_name.items():
        for tag, cell in by_tag(scores, evaluation.tags).items():
            error = "n/a" if cell["stderr"] is None else f"{cell['stderr']:.4f}"
            count = cell["prompts"]
            table.add_row(
                name,
                tag,
                f"{cell['mean']:.4f}",
                error,
                f"{count:,}",
                f"{count * config.evaluation.samples_per_prompt:,}",
            )
    text = io.StringIO()
    Console(file=text, width=110, color_system=None).print(table)
    return text.getvalue().rstrip()
