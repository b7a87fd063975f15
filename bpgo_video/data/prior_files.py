"""Where do anchors wait for training? `priors/<reward>.json` beside the prompts, one file per reward.

bpgo-video priors writes them; a training run reads the ones whose reward still has the version they were
measured with.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bpgo_video.atomic import write_json
from bpgo_video.data.prompt_records import ShardError
from bpgo_video.learner.priors import shrunk_means
from bpgo_video.types import PriorAnchor, PromptBatch

FORMAT_VERSION = 1
FIELDS = ("reward", "version", "scale", "policy", "anchors")


class PriorError(ShardError):
    """A prior that is missing, stale or incomplete."""


@dataclass(frozen=True)
class PriorTable:
    """The anchors of one reward for every prompt of a directory, by ascending id.

    Attributes:
        ids: [prompts] int64.
        anchors: [prompts, 3] float64: mean, std and count of the reference samples.
        policy: hash of the policy whose samples were scored.
    """

    reward: str
    version: str
    scale: float
    policy: str
    ids: np.ndarray
    anchors: np.ndarray
    command: str

    def check_policy(self, policy: str) -> None:
        """PriorError where the samples behind the anchors came from another policy than the one with this hash."""
        if self.policy != policy:
            raise PriorError(
                f"the prior of reward {self.reward!r} is stale: it was measured on a policy of hash {self.policy}, the "
                f"starting policy has {policy}; run: {self.command}"
            )

    def shrunk(self) -> PriorTable:
        """The same with means drawn towards the mean over prompts; see shrinkage.py."""
        mean, std, count = torch.from_numpy(self.anchors).T
        means = shrunk_means(mean, std, count.long())
        return replace(self, anchors=torch.stack([means, std, count], dim=1).numpy())

    def anchor(self, batch: PromptBatch) -> PriorAnchor:
        """The anchors of a batch's prompts.

        Raises:
            PriorError: a prompt has none.
        """
        wanted = batch.ids.cpu().numpy()
        rows = np.searchsorted(self.ids, wanted).clip(max=max(len(self.ids) - 1, 0))
        lacking = np.flatnonzero(self.ids[rows] != wanted) if len(self.ids) else np.arange(len(wanted))
        if len(lacking):
            text = batch.texts[lacking[0]]
            raise PriorError(
                f"the prior of reward {self.reward!r} has no anchor for {len(lacking)} of {len(wanted)} prompts, the "
                f"first {text!r} (id {wanted[lacking[0]]}); run: {self.command}"
            )
        mean, std, count = torch.from_numpy(self.anchors[rows]).T
        return PriorAnchor(mean.float(), std.float(), count.long(), self.scale, self.version)


def write_priors(
    directory: Path | str,
    reward: str,
    version: str,
    scale: float | int,
    policy: str,
    anchors: Mapping[int, tuple[float, float, int]],
) -> Path:
    """Store the anchors of one reward with the prompts, replacing what was there.

    Args:
        version: of the reward model; a later change of it makes the file stale.
        scale: s_ref, the pooled within-group standard deviation of the reference samples; above 0.
        policy: hash of the policy that made the samples.
        anchors: prompt id -> (mean, std, count).
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"the scale of reward {reward!r} is {scale}; it must be above 0 and finite")
    values = {str(key): [float(mean), float(std), int(count)] for key, (mean, std, count) in anchors.items()}
    path = prior_path(directory, reward)
    content = {
        "reward": reward,
        "version": version,
        "scale": float(scale),
        "policy": policy,
        "anchors": values,
    }
    write_json(path, {"format_version": FORMAT_VERSION, **content})
    return path


def load_priors(directory: Path | str, versions: Mapping[str, str], config: str = "FILE") -> dict[str, PriorTable]:
    """The stored anchors of the rewards named in `versions`.

    Args:
        versions: reward name -> its current version.
        config: the recipe's path, for the command that errors name.

    Raises:
        PriorError: a file is missing, unreadable, or was measured with another version of the reward; the message
            names the command that makes it.
    """
    return {name: _load(prior_path(directory, name), version, config) for name, version in versions.items()}


def require_priors(directory: Path | str, rewards: Iterable[str], config: str = "FILE") -> None:
    """PriorError where a reward has no stored anchors at all: known before the reward model is loaded."""
    for reward in rewards:
        path = prior_path(directory, reward)
        if not path.is_file():
            raise PriorError(_missing(path, config))


def _missing(path: Path, config: str) -> str:
    return f"the prior {path} is missing; run: {_command(config)}"


def _command(config: str) -> str:
    return f"bpgo-video priors --config {config}"


def attach_priors(batch: PromptBatch, priors: Iterable[PriorTable]) -> PromptBatch:
    """The batch with the anchors of its prompts, by reward name."""
    return replace(batch, priors={table.reward: table.anchor(batch) for table in priors})


def prior_path(directory: Path | str, reward: str) -> Path:
    if not re.fullmatch(r"[\w:-][\w.:-]*", reward):
        raise ValueError(f"the reward name {reward!r} must consist of letters, digits and any of . : _ -")
    return Path(directory) / "priors" / f"{reward}.json"


def _load(path: Path, version: str, config: str) -> PriorTable:
    command = _command(config)
    if not path.is_file():
        raise PriorError(_missing(path, config))
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {content['format_version']}, not {FORMAT_VERSION}")
        reward, measured, scale, policy, anchors = (content[name] for name in FIELDS)
        ids = np.fromiter(map(int, anchors), dtype=np.int64, count=len(anchors))
        values = np.array(list(anchors.values()), dtype=np.float64).reshape(len(anchors), 3)
    except (ValueError, KeyError, TypeError) as error:
        raise PriorError(f"the prior {path} cannot be read ({error!r}); run: {command}") from error
    if measured != version:
        raise PriorError(
            f"the prior {path} is stale: it was measured with version {measured} of reward {reward!r}, which is now "
            f"{version}; run: {command}"
        )
    order = np.argsort(ids)
    return PriorTable(reward, measured, scale, policy, ids[order], values[order], command)
