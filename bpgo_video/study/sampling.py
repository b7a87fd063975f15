"""New groups for the study of signals: rollouts of the embedded starting policy on its training prompts.

Each prompt gets several groups, sampled as in training; their noise depends on seed, prompt and group. The rewards are
the demo's, the first of them a second time on fewer frames, and the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from more_itertools import chunked
from tqdm import tqdm

from bpgo_video.config.bpgo import Config
from bpgo_video.config.deepspeed import zero_stage
from bpgo_video.config.learner import RewardConfig
from bpgo_video.config.reading import read_yaml
from bpgo_video.data.stream import as_batch
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.files import flush
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.prior_sampling import steps_of_group
from bpgo_video.study.groups import Sample, line_of
from bpgo_video.training.heldout import score_samples
from bpgo_video.training.inputs import check_inputs
from bpgo_video.training.session import frozen_policy, rollout_weights
from bpgo_video.types import Rewards

ORACLE = "oracle"
SECOND = "of 5 frames"


@dataclass(frozen=True)
class Sampling:
    """What is sampled.

    Attributes:
        config: recipe with seed, prompts and rewards.
        groups: of each prompt.
        prompts: at most this many; None takes all of the split.
    """

    config: Config
    groups: int
    prompts: int | None = None


def sampling_of(recipe: str, shards: Path, seed: int, group_size: int, groups: int, prompts: int | None) -> Sampling:
    """A shipped recipe of the embedded policy with the oracle and a second scoring as further rewards."""
    config: Any = read_yaml(Path(recipe))
    name, alignment = next(iter(config.rewards.items()))
    again = replace(alignment, options={**alignment.options, "frames": 5})
    rewards = {**config.rewards, f"{name} {SECOND}": again, ORACLE: RewardConfig(model="shapes_oracle")}
    config = replace(
        config,
        run=replace(config.run, seed=seed),
        data=replace(config.data, shards=str(shards)),
        rollout=replace(config.rollout, group_size=group_size, micro_batch_size=group_size),
        rewards=rewards,
    )
    return Sampling(config, groups, prompts)


def sample_groups(sampling: Sampling, mesh: Mesh, path: Path) -> None:
    """Append the groups that a dump lacks, prompt by prompt; a group that a kill cut off is sampled again."""
    config, size = sampling.config, sampling.config.rollout.group_size
    ds_config, shards = check_inputs(config, mesh, need_priors=False)
    rows = shards.rows(config.data.split).tolist()[: sampling.prompts]
    wanted = [(group, row) for group in range(sampling.groups) for row in rows]
    missing = wanted[whole_groups(path, size) :]
    if not missing:
        return
    suite, policy = RewardSuite(config.rewards, mesh.device, config.video.fps), frozen_policy(config, ds_config, mesh)
    dtype, denoiser = compute_dtype(ds_config), training_denoiser(policy, config)
    denoiser = replace(denoiser, records_path=False, records_means=False)
    with (
        rollout_weights(config, policy.transformers, zero_stage(ds_config), mesh),
        path.open("a", encoding="utf-8") as dump,
        tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="groups", unit="group") as bar,
    ):
        for part in chunked(missing, config.rollout.prompts_per_step):
            for group in dict.fromkeys(group for group, _ in part):
                records = [shards.record(row) for of, row in part if of == group]
                batch = conditioned(as_batch(records, image_size(config, policy)), policy, config, dtype, mesh, size)
                key, steps = ("study", group), steps_of_group(policy, config, group)
                same = config.rollout.same_start
                rewards = score_samples(denoiser, batch, suite, config, mesh, size, key, steps, same)
                dump.writelines(lines_of(batch.texts, rewards))
                dump.flush()
                bar.update(len(records))
    flush(path)


def lines_of(texts: Any, rewards: Rewards) -> list[str]:
    """A line for each sample, group by group."""
    frames: Mapping[str, np.ndarray] = {name: of.double().cpu().numpy() for name, of in rewards.per_frame.items()}
    return [
        line_of(
            Sample(
                text,
                frames[ORACLE][row, sample].tolist(),
                {name: of[row, sample].tolist() for name, of in frames.items() if name != ORACLE},
            )
        )
        for row, text in enumerate(texts)
        for sample in range(frames[ORACLE].shape[1])
    ]


def whole_groups(path: Path, size: int) -> int:
    """The number of complete groups of a dump; what follows them is cut off."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    whole = whole[: len(whole) // size * size]
    if len(whole) < len(lines):
        path.write_bytes(b"".join(whole))
    return len(whole) // size
