"""How are several models measured alike? The same prompts, noise and rewards for each, and nothing made twice.

OUTPUT/models/KEY/ holds one model's results (model_scores.py); KEY is a hash of all that they depend on. Prompts are
measured in blocks, and a block's scores are kept when it is done: the same command goes on where it was broken off, on
any number of ranks.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from bpgo_video.checkpoints.run_weights import WEIGHTS, put_into
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.data.atomic import write_json
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.prompt_records import PromptRecord
from bpgo_video.data.prompt_stream import as_batch
from bpgo_video.evaluation.comparing.model_scores import (
    Measure,
    ModelScores,
    PromptLine,
    holds_scores,
    read_scores,
    write_scores,
)
from bpgo_video.evaluation.comparing.witness import Witness, video_measures
from bpgo_video.generation.settings import Model, named_model
from bpgo_video.parallel.agreement import from_main, same_verdict
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.reports.metrics import MalformedFile
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.training.heldout import evaluate
from bpgo_video.training.policy_session import sampling_policy
from bpgo_video.training.session import check_inputs, heldout_rows
from bpgo_video.zero import engine

MODELS, PARTS = "models", "parts"
BLOCK = 4  # micro-batches of each rank in a block: rewards move to the device and back once in each


@dataclass(frozen=True)
class Asked:
    """A model to compare: what was named, and what to call it."""

    source: str
    label: str


@dataclass(frozen=True)
class Found:
    """A model's scores and the folder that holds them and its videos."""

    scores: ModelScores
    folder: Path


def with_all_rewards(config: Config) -> Config:
    """The recipe with its trained rewards measured, too.

    Raises:
        ConfigError: a reward has the name of a measure of the videos.
    """
    trained = {name: reward for name, reward in config.rewards.items() if reward.weight > 0}
    if taken := {*config.evaluation.rewards, *trained} & video_measures(2, 2).keys():
        raise ConfigError(f"the rewards {sorted(taken)} have names that a comparison uses itself; rename them")
    return replace(config, evaluation=replace(config.evaluation, rewards={**config.evaluation.rewards, **trained}))


def measures_of(config: Config, suite: RewardSuite) -> dict[str, Measure]:
    """What `with_all_rewards` and a witness measure: held-out rewards first, in the recipe's order."""
    found = {
        name: Measure("trained" if name in config.rewards else "heldout", suite.versions[name], suite.weights[name])
        for name in config.evaluation.rewards
    }
    return found | video_measures(config.video.num_frames, config.evaluation.samples_per_prompt)


def measure(asked: Sequence[Asked], config: Config, weights: str, output: Path, mesh: Mesh) -> list[Found]:
    """Results of each model, in order; those that are there already are read.

    Args:
        config: a recipe with held-out rewards.
        weights: which of a checkpoint's: a key of WEIGHTS.

    Raises:
        ConfigError, ShardError, CheckpointError, FileNotFoundError, RewardError: state the value, the rule and the way
            out.
    """
    config = with_all_rewards(config)
    suite = RewardSuite(config.evaluation.rewards, mesh.device, config.video.fps)
    ready = []
    for one in asked:
        model = named_model(one.source, config.policy.family)
        ready.append(Measuring(one, model, of_model(config, model, one), weights, suite, mesh))
    return [measuring.results(output / MODELS) for measuring in ready]


def of_model(config: Config, model: Model, asked: Asked) -> Config:
    """The recipe with this model's pipeline; all models need text embeddings of one encoder, which is checked later."""
    if model.checkpoint is None:
        return replace(config, policy=replace(config.policy, folder=asked.source))
    family = model.checkpoint.config.policy.family
    return replace(config, policy=replace(config.policy, folder=str(model.checkpoint.base), family=family))


def weights_settings(model: Model, weights: str) -> dict[str, Any]:
    """Which weights make the videos, by fingerprints."""
    checkpoint = model.checkpoint
    return {
        "pipeline": pipeline_fingerprint(model.policy.folder),
        "checkpoint": checkpoint and fingerprint(checkpoint.folder.parent, (checkpoint.folder.name,)),
        "weights": checkpoint and weights,
    }


def pipeline_fingerprint(folder: Path) -> str:
    return fingerprint(folder, [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."])


def deployment(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """How videos are made of weights and noise; plain JSON data, alike in all models of a comparison."""
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


class Measuring:
    """One model's way to its scores; every rank makes one and calls `results`."""

    def __init__(
        self, asked: Asked, model: Model, config: Config, weights: str, suite: RewardSuite, mesh: Mesh
    ) -> None:
        self.asked, self.model, self.config, self.weights = asked, model, config, weights
        self.suite, self.mesh = suite, mesh
        self.ds_config, self.shards = check_inputs(config, mesh, need_priors=False)
        with same_verdict(mesh):
            self.trained = WEIGHTS[weights](model.checkpoint.folder) if model.checkpoint else None
        self.rows = heldout_rows(config, self.shards)
        self.ids: list[int] = self.shards.ids(np.array(self.rows)).tolist()
        self.measures = measures_of(config, suite)

    def settings(self) -> dict[str, Any]:
        """All that the scores depend on; plain JSON data."""
        index = self.shards.index
        prompts = [index["shards"], index["negative_sha256"], self.ids]
        return {
            **weights_settings(self.model, self.weights),
            "deployment": deployment(self.config, engine.compute_dtype(self.ds_config)),
            "family": self.config.policy.family,
            "seed": self.config.run.seed,
            "samples_per_prompt": self.config.evaluation.samples_per_prompt,
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
            "measures": {name: asdict(measure) for name, measure in self.measures.items()},
        }

    def results(self, models: Path) -> Found:
        """The model's folder under `models`, whole."""
        settings = self.settings()
        folder = models / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if not from_main(holds_scores(folder), self.mesh):
            self.make_lines(folder)
            if self.mesh.is_main:
                self.join(folder, settings)
            self.mesh.barrier()
        scores = from_main(read_scores(folder) if self.mesh.is_main else None, self.mesh)
        assert scores is not None  # of rank 0, which has read it
        return Found(replace(scores, label=self.asked.label, source=self.asked.source), folder)

    def make_lines(self, folder: Path) -> None:
        """Measure the prompts that `folder` has no lines of yet."""
        done = from_main([line.id for line in read_parts(folder)], self.mesh)
        todo = [place for place, id_ in enumerate(self.ids) if id_ not in done]
        samples, micro = self.config.evaluation.samples_per_prompt, self.config.rollout.micro_batch_size
        size = max(1, BLOCK * self.mesh.data_size * micro // samples)
        if not todo:
            return
        policy = self.policy()
        with tqdm(
            total=len(self.rows),
            initial=len(self.rows) - len(todo),
            desc=self.asked.label,
            unit="prompt",
            disable=not self.mesh.is_main,
        ) as bar:
            for places in blocks(todo, size):
                lines = self.block(policy, places, folder)
                if self.mesh.is_main:
                    write_json(folder / PARTS / f"{places[0]:05d}.json", LINES.dump_python(lines, mode="json"))
                bar.update(len(places))
        del policy
        gc.collect()  # a model and the next one do not fit beside each other

    def policy(self) -> Policy:
        """The model, whole on this rank, without its text encoder."""
        policy = sampling_policy(self.config, self.ds_config, self.mesh)
        if self.model.checkpoint is not None and self.trained is not None:
            dtype = engine.compute_dtype(self.ds_config)
            for name in self.model.checkpoint.trained:
                put_into(policy.transformers[name], self.model.checkpoint, name, self.trained, dtype)
        return policy

    def block(self, policy: Policy, places: list[int], folder: Path) -> list[PromptLine]:
        """Scores of the prompts at these places, the same on every rank."""
        config, samples = self.config, self.config.evaluation.samples_per_prompt
        dtype = engine.compute_dtype(self.ds_config)
        records = [self.shards.record(self.rows[place]) for place in places]
        prompts = conditioned(as_batch(records, image_size(config, policy)), policy, config, dtype, self.mesh, samples)
        witness = Witness(folder, places, samples, config.video.fps)
        by_name = dict(evaluate(policy, prompts, self.suite, config, self.mesh, witness).by_name)
        by_name |= witness.scores(config.video.num_frames, self.mesh)
        return [
            line_of(record, {name: by_name[name][row].tolist() for name in self.measures})
            for row, record in enumerate(records)
        ]

    def join(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """The parts as one file; they go."""
        lines = {line.id: line for line in read_parts(folder)}
        checkpoint = self.model.checkpoint
        write_scores(
            folder,
            ModelScores(
                label=self.asked.label,
                source=self.asked.source,
                settings=dict(settings),
                measures=self.measures,
                prompts=[lines[id_] for id_ in self.ids],
                starts_from=settings["pipeline"],
                run=str(checkpoint.folder.parents[1]) if checkpoint else None,
                step=checkpoint.step if checkpoint else None,
            ),
        )
        shutil.rmtree(folder / PARTS)


LINES = TypeAdapter(list[PromptLine])


def line_of(record: PromptRecord, scores: dict[str, list[float]]) -> PromptLine:
    return PromptLine(record.id, record.prompt, list(record.tags), scores)


def read_parts(folder: Path) -> list[PromptLine]:
    """Lines of the prompts that are measured so far.

    Raises:
        MalformedFile: a part is not what this program writes.
    """
    found: list[PromptLine] = []
    for path in sorted((folder / PARTS).glob("*.json")):
        try:
            found += LINES.validate_json(path.read_bytes())
        except ValidationError as error:
            raise MalformedFile(f"{path}: {error}; delete it, and its prompts are measured again") from error
    return found


def blocks(places: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(places), size):
        yield list(places[start : start + size])
