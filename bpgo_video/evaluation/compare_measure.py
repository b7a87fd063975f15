"""Measurement of several models in the same way: the same prompts, noise and rewards; nothing is made twice.

OUTPUT/models/KEY/ holds one model's scores (scores.py); KEY is a hash of everything that they depend on. Prompts are
measured in blocks, and a block's scores are kept when it is done: the same command continues an interrupted one, on any
number of ranks.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.prompt_stream import as_batch
from bpgo_video.distributed import engine
from bpgo_video.distributed.agreement import all_or_none, from_main
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation.compare_scores import Measure, ModelScores, PromptLine, Scored, ScoresFolder, lines_of
from bpgo_video.evaluation.video_stats import VideoStats, video_measures
from bpgo_video.inference.run_weights import WEIGHTS, put_into
from bpgo_video.inference.settings import named_model
from bpgo_video.policies import Policy
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.training.heldout import evaluate
from bpgo_video.training.session import check_inputs, heldout_rows, sampling_policy

BLOCK = 4  # micro-batches of each rank in a block: rewards move to the device and back once in each


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
        self.request, self.suite, self.mesh = request, suite, mesh
        model = named_model(request.source, config.policy.family)
        self.checkpoint = model.checkpoint
        policy = replace(config.policy, folder=request.source)
        if self.checkpoint is not None:
            family = self.checkpoint.config.policy.family
            policy = replace(policy, folder=str(self.checkpoint.base), family=family)
        self.config = config = replace(config, policy=policy)
        self.samples = config.evaluation.samples_per_prompt
        self.ds_config, self.shards = check_inputs(config, mesh, need_priors=False)
        self.dtype = engine.compute_dtype(self.ds_config)
        with all_or_none(mesh):
            self.trained = WEIGHTS[weights](self.checkpoint.folder) if self.checkpoint else None
        self.rows = heldout_rows(config, self.shards)
        self.ids: list[int] = self.shards.ids(np.array(self.rows)).tolist()
        self.measures = {
            name: Measure("trained" if name in config.rewards else "heldout", suite.versions[name], suite.weights[name])
            for name in config.evaluation.rewards
        } | video_measures(config.video.num_frames, self.samples)
        self.settings = self._settings(model.policy.folder, weights)

    def _settings(self, pipeline: Path, weights: str) -> dict[str, Any]:
        """Everything that the scores depend on; plain JSON data."""
        config, index, checkpoint = self.config, self.shards.index, self.checkpoint
        parts = [path.name for path in pipeline.iterdir() if path.is_dir() and path.name[0] != "."]
        evaluation = ("num_steps", "guidance_scale", "guidance_scale_2", "solver")
        return {
            "pipeline": fingerprint(pipeline, parts),
            "checkpoint": checkpoint and fingerprint(checkpoint.folder.parent, (checkpoint.folder.name,)),
            "weights": checkpoint and weights,
            "deployment": {  # the same for all models of a comparison
                "video": asdict(config.video),
                **{name: getattr(config.evaluation, name) for name in evaluation},
                "shift": config.evaluation.shift_or(config.sampler),
                "max_sequence_length": config.policy.max_sequence_length,
                "dtype": str(self.dtype).removeprefix("torch."),
            },
            "family": config.policy.family,
            "seed": config.run.seed,
            "samples_per_prompt": self.samples,
            "prompts": digest(json.dumps([index["shards"], index["negative_sha256"], self.ids])),
            "measures": {name: asdict(measure) for name, measure in self.measures.items()},
        }

    def scored(self, models: Path) -> Scored:
        """The model's complete folder below `models`."""
        folder = ScoresFolder(models / digest(json.dumps(self.settings, sort_keys=True)))
        if not from_main(folder.complete, self.mesh):
            self.measure_rest(folder)
            if self.mesh.is_main:
                folder.write(self.join(folder.read_parts()))
            self.mesh.barrier()
        scored = from_main(folder.read(**vars(self.request)) if self.mesh.is_main else None, self.mesh)
        assert scored is not None  # rank 0 has read it
        return scored

    def measure_rest(self, folder: ScoresFolder) -> None:
        """Measures the prompts that are not in `folder` yet."""
        done = from_main(list(folder.read_parts()), self.mesh)
        todo = [place for place, id_ in enumerate(self.ids) if id_ not in done]
        if not todo:
            return
        mesh, label, count, policy = self.mesh, self.request.label, len(self.ids), self.policy()
        size = max(1, BLOCK * mesh.data_size * self.config.rollout.micro_batch_size // self.samples)
        with tqdm(total=count, initial=count - len(todo), desc=label, unit="prompt", disable=not mesh.is_main) as bar:
            for start in range(0, len(todo), size):
                places = todo[start : start + size]
                lines = self.block(policy, places, folder)
                if mesh.is_main:
                    folder.write_part(places[0], lines)
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

    def block(self, policy: Policy, places: list[int], folder: ScoresFolder) -> list[PromptLine]:
        """Scores of the prompts at these places, the same on every rank."""
        config = self.config
        records = [self.shards.record(self.rows[place]) for place in places]
        batch = as_batch(records, image_size(config, policy))
        prompts = conditioned(batch, policy, config, self.dtype, self.mesh, self.samples)
        stats = VideoStats(folder, places, self.samples, config.video.fps)
        found = {**evaluate(policy, prompts, self.suite, config, self.mesh, stats).by_name, **stats.scores(self.mesh)}
        return lines_of(records, {name: found[name] for name in self.measures})

    def join(self, lines: Mapping[int, PromptLine]) -> ModelScores:
        return ModelScores(
            label=self.request.label,
            source=self.request.source,
            settings=self.settings,
            measures=self.measures,
            prompts=[lines[id_] for id_ in self.ids],
            starts_from=self.settings["pipeline"],
            run=str(self.checkpoint.folder.parents[1]) if self.checkpoint else None,
            step=self.checkpoint.step if self.checkpoint else None,
        )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
