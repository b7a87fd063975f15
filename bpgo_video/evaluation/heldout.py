"""The command `evaluate heldout`: held-out scores of a policy folder, as training measures them.

Also the ranks of an evaluation: those of a launcher, with a heartbeat while they work, or this process alone.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch

from bpgo_video.cli import show_loading_once
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import read_yaml
from bpgo_video.config.run import ParallelConfig
from bpgo_video.data.records import PromptRecord
from bpgo_video.data.stream import as_batch
from bpgo_video.distributed import process_group
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import TIMEOUT, Mesh
from bpgo_video.evaluation.comparison import PromptLine, lines_of
from bpgo_video.files import write_json
from bpgo_video.inference.generate import ALONE, PATIENCE
from bpgo_video.policies import Policy
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.training.heldout import Scores, evaluate, stderr
from bpgo_video.training.inputs import check_inputs, heldout_rows
from bpgo_video.training.session import sampling_policy
from bpgo_video.training.summary import boxed
from bpgo_video.types import RolloutChunk

SETTINGS = ("split", "samples_per_prompt", "num_steps", "guidance_scale", "guidance_scale_2")


def run(args: argparse.Namespace) -> None:
    changes = {name: getattr(args, name) for name in ("policy", "split", "samples_per_prompt", "seed")}
    config = with_changes(read_yaml(args.config), **changes)
    show_loading_once()
    with evaluation_ranks(config.parallel) as mesh:
        content = evaluate_folder(config, mesh)
    if mesh.is_main:
        print(as_table(content))
        if args.output is not None:
            write_json(args.output, content)
            print(args.output)


def with_changes(
    config: Config,
    *,
    policy: str | None = None,
    split: str | None = None,
    samples_per_prompt: int | None = None,
    seed: int | None = None,
) -> Config:
    """The recipe with these values; None keeps the recipe's own.

    Raises:
        ConfigError: the recipe names no held-out rewards.
    """
    if not config.evaluation.rewards:
        raise ConfigError("evaluation.rewards is empty; name the rewards for held-out prompts in the recipe")
    own = config.evaluation
    evaluation = replace(own, split=split or own.split, samples_per_prompt=samples_per_prompt or own.samples_per_prompt)
    run = replace(config.run, seed=config.run.seed if seed is None else seed)
    folder = replace(config.policy, folder=policy or config.policy.folder)
    return replace(config, run=run, policy=folder, evaluation=evaluation)


def evaluate_folder(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Scores `policy.folder` on the held-out prompts, with the noise of a training run's evaluations of this seed.

    Returns:
        settings, summary by reward and tag, and every score, as plain JSON data; the same on every rank.

    Raises:
        ConfigError, ShardError, FileNotFoundError, RewardError: each states the value, the rule and the remedy.
    """
    ds_config, shards = check_inputs(config, mesh, need_priors=False)
    records = [shards.record(row) for row in heldout_rows(config, shards)]
    suite = RewardSuite(config.evaluation.rewards, mesh.device, config.video.fps)
    policy, dtype = sampling_policy(config, ds_config, mesh), compute_dtype(ds_config)
    lines = lines_of(records, score_prompts(policy, records, suite, config, dtype, mesh))
    return {
        "policy": config.policy.folder,
        "shards": config.data.shards,
        "seed": config.run.seed,
        **{name: getattr(config.evaluation, name) for name in SETTINGS},
        "rewards": {name: {"version": suite.versions[name], "by_tag": by_tag(lines, name)} for name in suite.versions},
        "prompts": [asdict(line) for line in lines],
    }


def score_prompts(
    policy: Policy,
    records: Sequence[PromptRecord],
    suite: RewardSuite,
    config: Config,
    dtype: torch.dtype,
    mesh: Mesh,
    on_chunk: Callable[[RolloutChunk], None] = lambda chunk: None,
) -> Mapping[str, Scores]:
    """Scores of new videos of these prompts by reward, the same on every rank; `on_chunk` receives the videos."""
    batch = as_batch(records, image_size(config, policy))
    prompts = conditioned(batch, policy, config, dtype, mesh, config.evaluation.samples_per_prompt)
    return evaluate(policy, prompts, suite, config, mesh, on_chunk).by_name


def by_tag(lines: Sequence[PromptLine], reward: str) -> dict[str, dict[str, Any]]:
    """Mean, standard error (None if there are too few samples) and number of prompts: of all, then of each tag."""
    table = {}
    for tag in ("all", *sorted({tag for line in lines for tag in line.tags})):
        scores = torch.tensor([line.scores[reward] for line in lines if tag in ("all", *line.tags)])
        error = stderr(scores) if scores.numel() > 1 else math.nan
        mean = float(scores.double().mean())
        table[tag] = {"mean": mean, "stderr": error if math.isfinite(error) else None, "prompts": len(scores)}
    return table


def as_table(content: Mapping[str, Any]) -> str:
    """One row per reward and tag: mean, standard error, prompts, videos."""
    rows = []
    for name, reward in content["rewards"].items():
        for tag, cell in reward["by_tag"].items():
            error = "n/a" if cell["stderr"] is None else f"{cell['stderr']:.4f}"
            counts = [f"{cell['prompts'] * videos:,}" for videos in (1, content["samples_per_prompt"])]
            rows.append([name, tag, f"{cell['mean']:.4f}", error, *counts])
    header = ("reward", "tag", "mean", "± stderr", "prompts", "videos")
    return boxed(rows, header, words=2, title=f"{content['policy']}, split {content['split']}")


@contextmanager
def evaluation_ranks(parallel: ParallelConfig, timeout: timedelta = TIMEOUT) -> Iterator[Mesh]:
    """All ranks of the launcher, or a process group of one; the group is stopped after the block.

    Args:
        timeout: how long a rank waits for the slowest one; a rank that dies or fails ends the others within seconds.
    """
    mesh = process_group.start_ranks(timeout)
    with Heartbeat(mesh, parallel.heartbeat_timeout, expected=(ValueError, OSError)) as heartbeat:
        heartbeat.enter("evaluation")
        yield mesh
    process_group.stop_ranks()


@contextmanager
def independent_ranks() -> Iterator[Mesh]:
    """Ranks for long work without communication; a single process starts no process group."""
    if "RANK" not in os.environ:
        process_group.refuse_lone_tasks()
        yield ALONE
        return
    with evaluation_ranks(ParallelConfig(), PATIENCE) as mesh:
        yield mesh


def device_of(requested: str | None, mesh: Mesh) -> torch.device:
    """The device of this rank. Raises ValueError if one accelerator is requested for several ranks."""
    device = mesh.device if requested is None else torch.device(requested)
    if mesh.world_size == 1:
        return device
    if requested is not None and device.index is not None:
        raise ValueError(
            f"--device {requested} is one device for {mesh.world_size} ranks; omit it to give each rank its own"
        )
    return mesh.device if device.type == mesh.device.type else device
