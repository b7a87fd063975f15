"""Prior anchors of the rewards, stored with the prompts: `priors/<reward>.json`, one file per reward.

`bpgo-video priors` writes them. A training run reads those that were measured with the reward's current version.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bpgo_video.atomic import atomic_file, write_json
from bpgo_video.data.records import ShardError
from bpgo_video.learner.shrinkage import shrunk_means
from bpgo_video.types import PriorAnchor, PromptBatch

FORMAT_VERSION = 1
COMMAND = "bpgo-video priors --config FILE"

Scores = dict[int, dict[str, list[float]]]  # prompt id -> reward name -> the score of each sample


class PriorError(ShardError):
    """A prior that is missing, stale or incomplete."""


@dataclass(frozen=True)
class PriorTable:
    """The anchors of one reward for every prompt of a folder, by ascending id.

    Attributes:
        version: of the reward when the anchors were measured.
        scale: s_ref, the pooled within-group standard deviation of the reference samples; above 0.
        policy: hash of the policy whose samples were scored.
        ids: [prompts] int64.
        anchors: [prompts, 3] float64: mean, std and count of the reference samples.
    """

    reward: str
    version: str
    scale: float
    policy: str
    ids: np.ndarray
    anchors: np.ndarray

    def check_policy(self, policy: str) -> None:
        """Raise PriorError if the samples came from another policy than the one with this hash."""
        if self.policy != policy:
            raise PriorError(
                f"the prior of reward {self.reward!r} is stale: it was measured on a policy of hash {self.policy}, the "
                f"starting policy has {policy}; run: {COMMAND}"
            )

    def shrunk(self) -> PriorTable:
        """The same table with shrunken means, see `shrunk_means`."""
        mean, std, count = torch.from_numpy(self.anchors).T
        means = shrunk_means(mean, std, count.long())
        return replace(self, anchors=torch.stack([means, std, count], dim=1).numpy())

    def anchor(self, batch: PromptBatch) -> PriorAnchor:
        """The anchors of a batch's prompts. Raises PriorError if one has none."""
        ids = batch.ids.cpu().numpy()
        missing = np.flatnonzero(~np.isin(ids, self.ids))
        if len(missing):
            raise PriorError(
                f"the prior of reward {self.reward!r} has no anchor for {len(missing)} of {len(ids)} prompts, the "
                f"first {batch.texts[missing[0]]!r} (id {ids[missing[0]]}); run: {COMMAND}"
            )
        mean, std, count = torch.from_numpy(self.anchors[np.searchsorted(self.ids, ids)]).T
        return PriorAnchor(mean.float(), std.float(), count.long(), self.scale, self.version)


def prior_path(directory: Path | str, reward: str) -> Path:
    if not re.fullmatch(r"[\w:-][\w.:-]*", reward):
        raise ValueError(f"the reward name {reward!r} must consist of letters, digits and any of . : _ -")
    return Path(directory) / "priors" / f"{reward}.json"


def write_priors(
    directory: Path | str,
    reward: str,
    version: str,
    scale: float | int,
    policy: str,
    anchors: Mapping[int, tuple[float, float, int]],
) -> Path:
    """Store the anchors of one reward with the prompts, replacing earlier ones.

    Args:
        version: of the reward; a later change of it makes the file stale.
        scale, policy: see PriorTable.
        anchors: prompt id -> (mean, std, count).
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"the scale of reward {reward!r} is {scale}; it must be above 0 and finite")
    content = {
        "format_version": FORMAT_VERSION,
        "reward": reward,
        "version": version,
        "scale": float(scale),
        "policy": policy,
        "anchors": {str(id_): [float(mean), float(std), int(count)] for id_, (mean, std, count) in anchors.items()},
    }
    path = prior_path(directory, reward)
    write_json(path, content)
    return path


def load_priors(directory: Path | str, versions: Mapping[str, str]) -> dict[str, PriorTable]:
    """The stored anchors of rewards.

    Args:
        versions: reward name -> its current version.

    Raises:
        PriorError: a file is missing, unreadable, or was measured with another version of the reward; the message
            names the command that makes it.
    """
    require_priors(directory, versions)
    return {reward: _load(prior_path(directory, reward), version) for reward, version in versions.items()}


def require_priors(directory: Path | str, rewards: Iterable[str]) -> None:
    """Raise PriorError if a reward has no stored anchors. Needs no reward model, unlike `load_priors`."""
    for path in (prior_path(directory, reward) for reward in rewards):
        if not path.is_file():
            raise PriorError(f"the prior {path} is missing; run: {COMMAND}")


def _load(path: Path, version: str) -> PriorTable:
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {content['format_version']}, not {FORMAT_VERSION}")
        ids = np.array([int(id_) for id_ in content["anchors"]], dtype=np.int64)
        anchors = np.array(list(content["anchors"].values()), dtype=np.float64).reshape(len(ids), 3)
        order = np.argsort(ids)
        stored = {name: content[name] for name in ("reward", "version", "scale", "policy")}
        table = PriorTable(**stored, ids=ids[order], anchors=anchors[order])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PriorError(f"the prior {path} cannot be read ({error!r}); run: {COMMAND}") from error
    if table.version != version:
        raise PriorError(
            f"the prior {path} is stale: it was measured with version {table.version} of reward {table.reward!r}, "
            f"which is now {version}; run: {COMMAND}"
        )
    return table


@dataclass(frozen=True)
class UnfinishedPriors:
    """Scores of an interrupted estimation in `priors/unfinished.jsonl`, read and written by one rank.

    The first line is {"key": ...}; each other line is {"id", "scores": {reward: [...]}} of one prompt.

    Attributes:
        key: plain JSON data on which the scores depend; a file with another key is replaced.
    """

    directory: Path
    key: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.directory / "priors" / "unfinished.jsonl"

    def begin(self) -> Scores:
        """The stored scores. A file with another key, or a line that was cut off, is dropped."""
        head = json.dumps({"key": self.key}, sort_keys=True) + "\n"
        lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("\n")] if lines[:1] == [head] else [head]
        with atomic_file(self.path) as aside:
            aside.write_text("".join(kept), "utf-8")
        return {entry["id"]: entry["scores"] for entry in map(json.loads, kept[1:])}

    def add(self, scores: Scores) -> None:
        """Append the scores of more prompts; they are on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": id_, "scores": by_reward}) + "\n" for id_, by_reward in scores.items())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
