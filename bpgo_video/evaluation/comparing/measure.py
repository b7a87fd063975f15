"""Measurement of several models in the same way: the same prompts, noise and rewards; nothing is made twice.

OUTPUT/models/KEY/ holds one model's scores (scores.py); KEY is a hash of everything that they depend on. Prompts are
measured in blocks, and a block's scores are kept when it is done: the same command continues an interrupted one, on any
number of ranks.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from tqdm import tqdm

from bpgo_video.checkpoints.run_weights import WEIGHTS, put_into
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.data.atomic import write_json
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.prompt_stream import as_batch
from bpgo_video.evaluation.comparing.scores import (
    REMEDY,
    Measure,
    ModelScores,
    PromptLine,
    Scored,
    holds_scores,
    read_scores,
    write_scores,
)
from bpgo_video.evaluation.comparing.video_stats import VideoStats, video_measures
from bpgo_video.evaluation.files import checked
from bpgo_video.generation.settings import named_model
from bpgo_video.parallel.agreement import from_main, same_verdict
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.training.heldout import evaluate
from bpgo_video.training.policy_session import sampling_policy
from bpgo_video.training.session import check_inputs, heldout_rows
from bpgo_video.zero import engine

BLOCK = 4  # micro-batches of each rank in a block: rewards move to the device and back once in each
LINES = TypeAdapter(list[PromptLine])


@dataclass(frozen=True)
class Request:
    """A model to compare: what was named, and its label."""

    source: str
    label: str


def measure(requests: Sequence[Request], config: Config, weights: str, output: Path, mesh: Mesh) -> list[Scored]:
    """The scores of each model, in order; those that exist are read. Every rank calls it.

    Args:
        config: a recipe with held-out rewards.
        weights: which of a checkpoint's: a key of WEIGHTS.

    Raises:
        ConfigError, ShardError, CheckpointError, FileNotFoundError, RewardError: state the value, the rule and the way
            out.
    """
    config = with_all_rewards(config)
    suite = RewardSuite(config.evaluation.rewards, mesh.device, config.video.fps)
    models = [Measurement(request, config, weights, suite, mesh) for request in requests]
    return [model.scored(output / "models") for model in models]


def with_all_rewards(config: Config) -> Config:
    """The recipe with its trained rewards measured, too. Raises ConfigError where names clash."""
    trained = {name: reward for name, reward in config.rewards.items() if reward.weight > 0}
    if taken := {*config.evaluation.rewards, *trained} & video_measures(2, 2).keys():
        raise ConfigError(f"the rewards {sorted(taken)} have names that a comparison uses itself; rename them")
    return replace(config, evaluation=replace(config.evaluation, rewards={**config.evaluation.rewards, **trained}))


class Measurement:
    """The measurement of one model; every rank makes one and calls `scored`."""

    def __init__(self, request: Request, config: Config, weights: str, suite: RewardSuite, mesh: Mesh) -> None:
        model = named_model(request.source, config.policy.family)
        self.request, self.suite, self.mesh, self.checkpoint = request, suite, mesh, model.checkpoint
        policy = replace(config.policy, folder=request.source)
        if model.checkpoint is not None:
            family = model.checkpoint.config.policy.family
            policy = replace(policy, folder=str(model.checkpoint.base), family=family)
        self.config = config = replace(config, policy=policy)
        self.ds_config, self.shards = check_inputs(config, mesh, need_priors=False)
        self.dtype = engine.compute_dtype(self.ds_config)
        with same_verdict(mesh):
            self.trained = WEIGHTS[weights](model.checkpoint.folder) if model.checkpoint else None
        self.rows = heldout_rows(config, self.shards)
        self.ids: list[int] = self.shards.ids(np.array(self.rows)).tolist()
        roles = {name: "trained" if name in config.rewards else "heldout" for name in config.evaluation.rewards}
        self.measures = {name: Measure(role, suite.versions[name], suite.weights[name]) for name, role in roles.items()}
        self.measures |= video_measures(config.video.num_frames, config.evaluation.samples_per_prompt)
        self.settings = {**weights_settings(model.policy.folder, model.checkpoint, weights), **self._settings()}

    def _settings(self) -> dict[str, Any]:
        index, config = self.shards.index, self.config
        return {
            "deployment": deployment(config, self.dtype),
            "family": config.policy.family,
            "seed": config.run.seed,
            "samples_per_prompt": config.evaluation.samples_per_prompt,
            "prompts": digest([index["shards"], index["negative_sha256"], self.ids]),
            "measures": {name: asdict(measure) for name, measure in self.measures.items()},
        }

    def scored(self, models: Path) -> Scored:
        """The model's complete folder below `models`."""
        folder = models / digest(self.settings, sort_keys=True)
        if not from_main(holds_scores(folder), self.mesh):
            self.measure_rest(folder)
            if self.mesh.is_main:
                self.join(folder)
            self.mesh.barrier()
        read = read_scores(folder, label=self.request.label, source=self.request.source) if self.mesh.is_main else None
        scored = from_main(read, self.mesh)
        assert scored is not None  # rank 0 has read it
        return scored

    def measure_rest(self, folder: Path) -> None:
        """Measures the prompts that `folder` has no lines of yet."""
        done = from_main([line.id for line in read_parts(folder)], self.mesh)
        todo = [place for place, id_ in enumerate(self.ids) if id_ not in done]
        if not todo:
            return
        config, policy = self.config, self.policy()
        size = max(
            1, BLOCK * self.mesh.data_size * config.rollout.micro_batch_size // config.evaluation.samples_per_prompt
        )
        started = len(self.rows) - len(todo)
        bar = tqdm(
            total=len(self.rows), initial=started, desc=self.request.label, unit="prompt", disable=not self.mesh.is_main
        )
        with bar:
            for start in range(0, len(todo), size):
                places = todo[start : start + size]
                lines = self.block(policy, places, folder)
                if self.mesh.is_main:
                    write_json(folder / "parts" / f"{places[0]:05d}.json", LINES.dump_python(lines, mode="json"))
                bar.update(len(places))
        del policy
        gc.collect()  # this model and the next one do not fit in memory together

    def policy(self) -> Policy:
        """The model, whole on this rank, without its text encoder."""
        policy = sampling_policy(self.config, self.ds_config, self.mesh)
        if self.checkpoint is not None and self.trained is not None:
            for name in self.checkpoint.trained:
                put_into(policy.transformers[name], self.checkpoint, name, self.trained, self.dtype)
        return policy

    def block(self, policy: Policy, places: list[int], folder: Path) -> list[PromptLine]:
        """Scores of the prompts at these places, the same on every rank."""
        config, samples = self.config, self.config.evaluation.samples_per_prompt
        records = [self.shards.record(self.rows[place]) for place in places]
        batch = as_batch(records, image_size(config, policy))
        prompts = conditioned(batch, policy, config, self.dtype, self.mesh, samples)
        stats = VideoStats(folder, places, samples, config.video.fps)
        by_name = {**evaluate(policy, prompts, self.suite, config, self.mesh, stats).by_name, **stats.scores(self.mesh)}
        return [
            PromptLine(
                one.id, one.prompt, list(one.tags), {name: by_name[name][row].tolist() for name in self.measures}
            )
            for row, one in enumerate(records)
        ]

    def join(self, folder: Path) -> None:
        """Writes the parts as one file, and deletes them."""
        lines = {line.id: line for line in read_parts(folder)}
        scores = ModelScores(
            label=self.request.label,
            source=self.request.source,
            settings=self.settings,
            measures=self.measures,
            prompts=[lines[id_] for id_ in self.ids],
            starts_from=self.settings["pipeline"],
            run=str(self.checkpoint.folder.parents[1]) if self.checkpoint else None,
            step=self.checkpoint.step if self.checkpoint else None,
        )
        write_scores(folder, scores)
        shutil.rmtree(folder / "parts")


def weights_settings(pipeline: Path, checkpoint: Any, weights: str) -> dict[str, Any]:
    """Which weights make the videos, by fingerprints."""
    parts = [path.name for path in pipeline.iterdir() if path.is_dir() and path.name[0] != "."]
    return {
        "pipeline": fingerprint(pipeline, parts),
        "checkpoint": checkpoint and fingerprint(checkpoint.folder.parent, (checkpoint.folder.name,)),
        "weights": checkpoint and weights,
    }


def deployment(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """How videos are made from weights and noise, the same for all models of a comparison; plain JSON data."""
    evaluation = config.evaluation
    return {
        "video": asdict(config.video),
        "num_steps": evaluation.num_steps,
        "guidance_scale": evaluation.guidance_scale,
        "guidance_scale_2": evaluation.guidance_scale_2,
        "solver": evaluation.solver,
        "shift": evaluation.shift_or(config.sampler),
        "max_sequence_length": config.policy.max_sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
    }


def digest(content: Any, sort_keys: bool = False) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=sort_keys).encode()).hexdigest()[:16]


def read_parts(folder: Path) -> list[PromptLine]:
    """Lines of the prompts measured so far. Raises MalformedFile."""
    paths = sorted((folder / "parts").glob("*.json"))
    return [line for path in paths for line in checked(LINES, path.read_bytes(), path, REMEDY)]
