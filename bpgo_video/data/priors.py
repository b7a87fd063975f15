"""Prior anchors of the rewards, stored with the prompts: `priors/<reward>.json`, one file per reward.

`bpgo-video priors` writes them. A training run reads those that were measured with the reward's current version.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from bpgo_video.cli import typed, without_common_flags
from bpgo_video.data.records import ShardError
from bpgo_video.documents import MalformedFile, check_seal, sealed
from bpgo_video.files import atomic_file, write_json
from bpgo_video.learner.priors import shrunk_means
from bpgo_video.types import PriorAnchor, PromptBatch

Number = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Samples = Annotated[int, Field(ge=1)]
Anchor = tuple[Number, NotNegative, Samples, NotNegative]  # see `learner.priors.reference_moments`
PARTS = ("mean", "standard deviation", "count", "spread within a group")  # of an anchor
Anchors = dict[int, dict[str, Anchor]]  # prompt id -> reward name -> anchor
Scores = dict[tuple[int, int], dict[str, list[float]]]  # prompt id, group -> reward name -> the score of each sample
RUNS = ("train", "sft", "doctor")  # commands that take a recipe and its flags, as `priors` does


class PriorError(ShardError):
    """A prior that is missing, stale or incomplete; the message ends with the command that measures it.

    Args:
        flags: that the command needs besides the run's own.
    """

    def __init__(self, problem: str, *flags: str) -> None:
        words = without_common_flags(sys.argv[1:])
        if words[:1] and words[0] in RUNS:
            words = words[1:]
        elif not any(word.startswith("--config") or word.endswith(".yaml") for word in words):
            words = ["RECIPE"]  # not a command line of a run
        super().__init__(f"{problem}; run: {typed('priors', [*words, *flags])}")


class PriorTable(BaseModel, frozen=True):
    """The anchors of one reward for the prompts of a folder; the content of its file.

    Attributes:
        version: of the reward when the anchors were measured.
        scale: s_ref, the pooled within-group standard deviation of the reference samples.
        policy: hash of the policy whose samples were scored.
        settings: everything that the scores depend on, as text by name; measurements of other settings are not mixed.
        anchors: prompt id -> mean, std, count and spread of the reference samples.
    """

    format_version: Literal[2] = 2
    reward: str
    version: str
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    policy: str
    settings: dict[str, str]
    anchors: dict[int, Anchor]

    def check_policy(self, policy: str) -> None:
        """Raise PriorError if the samples came from another policy than the one with this hash."""
        if self.policy != policy:
            raise PriorError(
                f"the prior of reward {self.reward!r} is stale: it was measured on a policy of hash {self.policy}, the "
                f"starting policy has {policy}"
            )

    def shrunk(self) -> PriorTable:
        """The same table with shrunken means, see `shrunk_means`."""
        ids = sorted(self.anchors)
        mean, std, count, _ = torch.tensor([self.anchors[id_] for id_ in ids], dtype=torch.float64).T
        means = shrunk_means(mean, std, count.long()).tolist()
        anchors = {id_: (mean, *self.anchors[id_][1:]) for id_, mean in zip(ids, means, strict=True)}
        return self.model_copy(update={"anchors": anchors})

    def anchor(self, batch: PromptBatch) -> PriorAnchor:
        """The anchors of a batch's prompts. Raises PriorError if one has none."""
        rows = [self.anchors.get(id_) for id_ in batch.ids.tolist()]
        missing = [number for number, row in enumerate(rows) if row is None]
        if missing:
            raise PriorError(
                f"the prior of reward {self.reward!r} has no anchor for {len(missing)} of {len(rows)} prompts, the "
                f"first {batch.texts[missing[0]]!r} (id {batch.ids[missing[0]]})"
            )
        mean, std, count, _ = torch.tensor(rows, dtype=torch.float64).T
        return PriorAnchor(mean.float(), std.float(), count.long(), self.scale, self.version)


def prior_path(directory: Path | str, reward: str) -> Path:
    if not re.fullmatch(r"[\w:-][\w.:-]*", reward):
        raise ValueError(f"the reward name {reward!r} must consist of letters, digits and any of . : _ -")
    return Path(directory) / "priors" / f"{reward}.json"


def write_priors(directory: Path | str, table: PriorTable) -> Path:
    """Store the anchors of one reward with the prompts, replacing earlier ones."""
    path = prior_path(directory, table.reward)
    write_json(path, sealed(table.model_dump()))
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
    tables = {}
    for reward, version in versions.items():
        path = prior_path(directory, reward)
        table = _read(path)
        if table.version != version:
            raise PriorError(
                f"the prior {path} is stale: it was measured with version {table.version} of reward {reward!r}, which "
                f"is now {version}"
            )
        tables[reward] = table
    return tables


def _read(path: Path) -> PriorTable:
    data = path.read_bytes()
    try:
        table = PriorTable.model_validate_json(data)
        check_seal(json.loads(data), f"the prior {path}")
    except ValidationError as error:
        raise PriorError(f"the prior {path} cannot be read ({_first_problem(error)})") from error
    except MalformedFile as error:
        raise PriorError(f"{error}") from None
    return table


def extensible_anchors(directory: Path, rewards: Sequence[str], settings: Mapping[str, str]) -> tuple[Anchors, str]:
    """The stored anchors of prompts that have one of every reward, if all were measured with these settings.

    Returns:
        No anchors if one file is missing, cannot be read or has other settings, and what is the matter with it.
    """
    tables = {}
    for path in (prior_path(directory, reward) for reward in rewards):
        if not path.is_file():
            return {}, ""
        try:
            table = _read(path)
        except PriorError as error:
            return {}, str(error).partition("; run:")[0]
        if changed := _differing(table.settings, settings):
            return {}, f"the {len(table.anchors)} anchors of {path} were measured with another {changed}"
        tables[table.reward] = table.anchors
    common = set.intersection(*map(set, tables.values()))
    return {id_: {name: anchors[id_] for name, anchors in tables.items()} for id_ in common}, ""


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    return ", ".join(sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)))


def _first_problem(error: ValidationError) -> str:
    """`the mean of prompt 7 is nan: Input should be a finite number`"""
    problem = error.errors()[0]
    match problem["loc"]:
        case ("anchors", prompt, int(part)) if problem["type"] != "missing":
            return f"the {PARTS[part]} of prompt {prompt} is {problem['input']}: {problem['msg']}"
        case place:
            return f"{'.'.join(map(str, place)) or 'content'}: {problem['msg']}"


def require_priors(directory: Path | str, rewards: Iterable[str]) -> None:
    """Raise PriorError if a reward has no stored anchors. Needs no reward model, unlike `load_priors`."""
    for path in (prior_path(directory, reward) for reward in rewards):
        if not path.is_file():
            raise PriorError(f"the prior {path} is missing")


@dataclass(frozen=True)
class UnfinishedPriors:
    """Scores of an interrupted estimation in `priors/unfinished.jsonl`, read and written by one rank.

    The first line is {"settings": ...}; each other line is {"id", "group", "scores": {reward: [...]}} of one group.

    Attributes:
        settings: as in PriorTable; a file with others is replaced.
    """

    directory: Path
    settings: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.directory / "priors" / "unfinished.jsonl"

    def begin(self) -> Scores:
        """The stored scores. A line that was cut off is dropped; a file with other settings too, with a message."""
        head = json.dumps({"settings": self.settings}, sort_keys=True) + "\n"
        lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("\n")] if lines[:1] == [head] else [head]
        if len(lines) > 1 and lines[0] != head:
            groups = len(lines) - 1
            print(f"{self.path}: an unfinished measurement with other settings is dropped, scored groups: {groups}")
        with atomic_file(self.path) as aside:
            aside.write_text("".join(kept), "utf-8")
        return {(entry["id"], entry["group"]): entry["scores"] for entry in map(json.loads, kept[1:])}

    def add(self, scores: Scores) -> None:
        """Append the scores of more groups; they are on the disk when this returns."""
        lines = ({"id": id_, "group": group, "scores": by_reward} for (id_, group), by_reward in scores.items())
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
