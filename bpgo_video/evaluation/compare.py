"""The command `evaluate compare`: measures several models in the same way, or reads their scores, and compares them.

OUTPUT/models/KEY/ holds one model's scores (comparison.py); KEY is a hash of all settings that they depend on.
Prompts are measured in blocks, and the scores of each finished block are kept: the same command continues an
interrupted comparison, on any number of ranks.

Two statistics describe the videos themselves, because policies that exploit their rewards often stop moving or make the
same video in all samples of a prompt. Both are in units of pixel values in [0, 1].

    pixel_motion      mean |I_{t+1} - I_t| of a video
    pixel_diversity   of a sample: mean over the prompt's other samples of the RMS difference of their thumbnails

Thumbnails are means over cells of space and time, so that content counts more than grain.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d
from tqdm import tqdm

from bpgo_video.cli import show_loading_once
from bpgo_video.config.bpgo import Config, ConfigError, RewardConfig
from bpgo_video.config.reading import read_recipe, read_yaml
from bpgo_video.data.media import write_video
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_main
from bpgo_video.evaluation import comparison as files
from bpgo_video.evaluation.compare_report import as_table, write_report
from bpgo_video.evaluation.comparison import DIVERSITY, MOTION, Measure, ModelScores, compare, write_comparison
from bpgo_video.evaluation.heldout import evaluation_ranks, score_prompts, with_changes
from bpgo_video.files import fingerprint
from bpgo_video.inference.run_weights import WEIGHTS, load_trained, named_model
from bpgo_video.policies import Policy
from bpgo_video.rewards.groups import groupwise_names
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.training.heldout import Scores
from bpgo_video.training.inputs import check_inputs, heldout_rows
from bpgo_video.training.session import sampling_policy
from bpgo_video.types import RolloutChunk, Videos

EXPORTS = ("export", "export-ema")
BLOCK = 4  # micro-batches of each rank in a block: rewards move to the device and back once per block
CELLS = (8, 16, 16)  # frames, rows and columns of a thumbnail, at most


@dataclass(frozen=True)
class Request:
    """A model to compare: its path on the command line, and its label."""

    source: str
    label: str


def run(args: argparse.Namespace) -> None:
    """Runs the command; models with scores need neither a recipe nor ranks."""
    if len(args.models) < 2:
        raise ConfigError(f"a comparison needs two models or more, but only {len(args.models)} is given")
    requests, is_main = labelled(args.models), True
    scores = {
        one: files.read_scores(Path(one.source), label=one.label)
        for one in requests
        if files.has_scores(Path(one.source))
    }
    if rest := [one for one in requests if one not in scores]:
        changes = {"split": args.split, "samples_per_prompt": args.samples_per_prompt, "seed": args.seed}
        config = with_changes(recipe_of(requests, args.config), **changes)
        show_loading_once()
        try:
            with evaluation_ranks(config.parallel) as mesh:
                measured = measure(rest, config, args.weights, args.output, mesh)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error  # a mistake of the user, not of a run
        scores |= dict(zip(rest, measured, strict=True))
        is_main = mesh.is_main
    if is_main:
        compared = compare([scores[one] for one in requests])
        print(as_table(compared))
        print(write_comparison(args.output, compared))
        print(write_report(args.output, compared, shown=args.shown))


def labelled(arguments: Sequence[str]) -> list[Request]:
    """Models of the command line, `PATH` or `NAME=PATH`, with distinct labels.

    Without a name, the label is `RUN step-000050` for a checkpoint, `RUN/export` for an export, else the folder's name.
    """
    requests: list[Request] = []
    for argument in arguments:
        label, equals, source = argument.partition("=")
        if not equals or "/" in label:
            source = argument
            parts = [part for part in source.replace(":", "/").split("/") if part not in ("", ".")]
            label = "/".join(parts[-2:]) if parts[-1] in EXPORTS else parts[-1]
            if len(parts) >= 3 and parts[-2] == "checkpoints":
                label = f"{parts[-3]} {parts[-1]}"
        used = [one.label for one in requests]
        numbered = (label, *(f"{label} ({number})" for number in range(2, len(used) + 2)))
        requests.append(Request(source, next(one for one in numbered if one not in used)))
    return requests


def recipe_of(requests: Sequence[Request], config: Path | None) -> Config:
    """The given recipe, or that of the first run among the models; a checkpoint or an export belongs to its run.

    Raises:
        ConfigError: there is neither. Runs of kind sft do not count, because they have no rewards.
    """
    if config is not None:
        return read_yaml(config)
    for one in requests:
        path = Path(one.source).expanduser()
        folder = path.parents[1] if path.parent.name == "checkpoints" else path.parent if path.name in EXPORTS else path
        if (folder / "config.yaml").is_file() and isinstance(recipe := read_recipe(folder / "config.yaml"), Config):
            return recipe
    raise ConfigError("none of the models is a run with rewards; give the recipe to measure them by: --config RECIPE")


def measure(requests: Sequence[Request], config: Config, weights: str, output: Path, mesh: Mesh) -> list[ModelScores]:
    """The scores of each model, in order; existing ones are read. Every rank calls it.

    Args:
        config: a recipe with held-out rewards.
        weights: of a checkpoint; a key of WEIGHTS.

    Raises:
        ConfigError, ShardError, CheckpointError, FileNotFoundError, RewardError: each states the value, the rule and
            the remedy.
    """
    rewards = compared_rewards(config)
    config = replace(config, evaluation=replace(config.evaluation, rewards=rewards))
    suite = RewardSuite(rewards, mesh.device, config.video.fps)
    models = [Measurement(request, config, weights, suite, mesh) for request in requests]
    return [model.scores(output / "models") for model in models]


def compared_rewards(config: Config) -> dict[str, RewardConfig]:
    """The held-out rewards, then those that train, without those that compare the samples of one policy.

    Raises:
        ConfigError: one has the name of a statistic of videos.
    """
    trained, own = config.trained_rewards, groupwise_names(config.trained_rewards)
    rewards = {**config.evaluation.rewards, **{name: trained[name] for name in trained if name not in own}}
    if taken := rewards.keys() & {MOTION, DIVERSITY}:
        raise ConfigError(
            f"the rewards {sorted(taken)} have names that a comparison uses for its own measures; rename them"
        )
    return rewards


class Measurement:
    """The measurement of one model. Every rank makes one, which checks all inputs, and calls `scores`."""

    def __init__(self, request: Request, config: Config, weights: str, suite: RewardSuite, mesh: Mesh) -> None:
        self.request, self.suite, self.mesh = request, suite, mesh
        with all_or_none(mesh):
            model = named_model(request.source, config.policy.family, rank=mesh.rank, world_size=mesh.world_size)
        self.checkpoint = checkpoint = model.checkpoint
        policy = replace(config.policy, folder=request.source)
        if checkpoint is not None:
            policy = replace(policy, folder=str(checkpoint.base), family=checkpoint.config.policy.family)
        self.config = config = replace(config, policy=policy)
        self.ds_config, self.shards = check_inputs(config, mesh, need_priors=False)
        self.dtype = compute_dtype(self.ds_config)
        with all_or_none(mesh):
            self.trained = WEIGHTS[weights](checkpoint.folder) if checkpoint else None
        self.rows = heldout_rows(config, self.shards)
        self.ids: list[int] = self.shards.ids(np.array(self.rows)).tolist()
        self.measures = measures_of(config, suite)
        self.settings = self.settings_of(model.policy.folder, weights)

    def settings_of(self, pipeline: Path, weights: str) -> dict[str, Any]:
        """All settings that the scores depend on, as plain JSON data."""
        config, evaluation, checkpoint = self.config, self.config.evaluation, self.checkpoint
        parts = [path.name for path in pipeline.iterdir() if path.is_dir() and path.name[0] != "."]
        prompts = [self.shards.index["shards"], self.shards.index["negative_sha256"], self.ids]
        return {
            "pipeline": fingerprint(pipeline, parts),
            "checkpoint": checkpoint and fingerprint(checkpoint.folder.parent, (checkpoint.folder.name,)),
            "weights": checkpoint and weights,
            "deployment": {  # the same for all models of a comparison
                "video": asdict(config.video),
                **{name: getattr(evaluation, name) for name in ("num_steps", "guidance_scale", "guidance_scale_2")},
                "solver": evaluation.solver,
                "shift": evaluation.shift_or(config.sampler),
                "sigmas": list(evaluation.sigmas_or(config.sampler)),
                "max_sequence_length": config.policy.max_sequence_length,
                "dtype": str(self.dtype).removeprefix("torch."),
            },
            "family": config.policy.family,
            "seed": config.run.seed,
            "samples_per_prompt": evaluation.samples_per_prompt,
            "prompts": digest(json.dumps(prompts)),
            "measures": {name: asdict(measure) for name, measure in self.measures.items()},
        }

    def scores(self, models: Path) -> ModelScores:
        """The model's scores, from its folder in `models` if it is complete."""
        folder = models / digest(json.dumps(self.settings, sort_keys=True))
        if not from_main(files.has_scores(folder), self.mesh):
            self.measure_rest(folder)
            if self.mesh.is_main:
                files.write_scores(self.joined(folder))
            self.mesh.barrier()
        scores = from_main(files.read_scores(folder, **vars(self.request)) if self.mesh.is_main else None, self.mesh)
        assert scores is not None  # rank 0 has read it
        return scores

    def measure_rest(self, folder: Path) -> None:
        """Measures the prompts that are missing in `folder`."""
        done = from_main(list(files.read_parts(folder)), self.mesh)
        todo = [place for place, id_ in enumerate(self.ids) if id_ not in done]
        if not todo:
            return
        mesh, config, count, policy = self.mesh, self.config, len(self.ids), self.policy()
        samples = config.evaluation.samples_per_prompt
        size = max(1, BLOCK * mesh.data_size * config.rollout.micro_batch_size // samples)
        label = self.request.label
        with tqdm(total=count, initial=count - len(todo), desc=label, unit="prompt", disable=not mesh.is_main) as bar:
            for start in range(0, len(todo), size):
                places = todo[start : start + size]
                records = [self.shards.record(self.rows[place]) for place in places]
                stats = VideoStats([files.video_path(folder, place) for place in places], samples, config.video.fps)
                scores = score_prompts(policy, records, self.suite, config, self.dtype, mesh, stats)
                scores = {**scores, **stats.scores(mesh)}
                if mesh.is_main:
                    lines = files.lines_of(records, {name: scores[name] for name in self.measures})
                    files.write_part(folder, places[0], lines)
                bar.update(len(places))
        del policy
        gc.collect()  # this model and the next one do not fit in memory together

    def policy(self) -> Policy:
        """The whole model on this rank, without its text encoder."""
        policy = sampling_policy(self.config, self.ds_config, self.mesh)
        if self.checkpoint is not None and self.trained is not None:
            for name in self.checkpoint.trained:
                load_trained(policy.transformers[name], self.checkpoint, name, self.trained, self.dtype)
        return policy

    def joined(self, folder: Path) -> ModelScores:
        lines = files.read_parts(folder)
        return ModelScores(
            label=self.request.label,
            source=self.request.source,
            settings=self.settings,
            measures=self.measures,
            prompts=[lines[id_] for id_ in self.ids],
            starts_from=self.settings["pipeline"],
            run=str(self.checkpoint.folder.parents[1]) if self.checkpoint else None,
            step=self.checkpoint.step if self.checkpoint else None,
            folder=folder,
        )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measures_of(config: Config, suite: RewardSuite) -> dict[str, Measure]:
    """The rewards and the statistics of videos; a single frame has no motion, a single sample no diversity."""
    measures = {
        name: Measure("trained" if name in config.rewards else "heldout", suite.versions[name], suite.weights[name])
        for name in config.evaluation.rewards
    }
    defined = {MOTION: config.video.num_frames > 1, DIVERSITY: config.evaluation.samples_per_prompt > 1}
    return measures | {name: Measure("video", "1") for name, is_defined in defined.items() if is_defined}


def motion(videos: Videos) -> Float[Tensor, "samples"]:
    return videos.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


def thumbnails(videos: Videos) -> Float[Tensor, "samples cells"]:
    frames, _, height, width = videos.shape[1:]
    cells = (min(CELLS[0], frames), min(CELLS[1], height), min(CELLS[2], width))
    return adaptive_avg_pool3d(videos.float().transpose(1, 2), cells).flatten(1)


def diversity(small: Float[Tensor, "prompts samples cells"]) -> Scores:
    distances = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / small.shape[2] ** 0.5
    return distances.sum(dim=2) / (small.shape[1] - 1)


class VideoStats:
    """Motion and diversity of a block of prompts, computed while the videos are scored; writes first samples.

    Args:
        paths: the file for the first sample of each prompt in the block.
    """

    def __init__(self, paths: Sequence[Path], samples: int, fps: float) -> None:
        self._paths, self._samples, self._fps = paths, samples, fps
        self._items: list[int] = []
        self._motion: list[Tensor] = []
        self._small: list[Tensor] = []

    def __call__(self, chunk: RolloutChunk) -> None:
        self._items += (chunk.prompt_rows * self._samples + chunk.sample_index).tolist()
        self._motion.append(motion(chunk.videos))
        self._small.append(thumbnails(chunk.videos))
        samples = zip(chunk.videos, chunk.prompt_rows, chunk.sample_index, strict=True)
        for number, (video, row, sample) in enumerate(samples):
            if sample == 0:
                write_video(self._paths[int(row)], video.cpu(), self._fps, audio=chunk.sound(number))

    def scores(self, mesh: Mesh) -> dict[str, Scores]:
        """Both statistics of all ranks' samples, on every rank; see `measures_of` for when they are defined."""
        total = len(self._paths) * self._samples
        moves, small = (
            mesh.gather(torch.cat(parts), self._items, total).unflatten(0, (-1, self._samples)).cpu()
            for parts in (self._motion, self._small)
        )
        return {MOTION: moves, DIVERSITY: diversity(small)}
