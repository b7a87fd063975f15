"""What is a reward? A model that scores the frames of a video, or the video as a whole; and a suite of several.

A user's own reward is any class with these members, named in a recipe as `my_pkg.rewards:MyReward`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.config import ConfigError, RewardConfig
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk, Videos


@runtime_checkable
class RewardModel(Protocol):
    """Members that a reward model must have.

    Attributes:
        name, version: what was measured; the version is a hash that changes when the scores do.
        range: lowest and highest score.
        higher_is_better: a suite turns the sign of the others.
        differentiable: scores carry a gradient with respect to the pixels.
        kind: "real", "proxy" (stands in for a model that is not at hand) or "test" (knows the truth of a toy world).
    """

    name: str
    version: str
    range: tuple[float, float]
    higher_is_better: bool
    differentiable: bool
    kind: str

    def __call__(self, videos: Videos, texts: Sequence[str]) -> Float[Tensor, "samples scored_frames"]:
        """A score per frame that it looked at; a score per video is a single column."""
        ...


REWARDS: dict[str, str] = {
    "clip_score": "bpgo_video.rewards.clip:ClipScore",
    "learned_motion": "bpgo_video.rewards.motion:LearnedMotion",
    "shapes_oracle": "bpgo_video.rewards.oracle:ShapesOracle",
}
AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda per_frame: per_frame.mean(dim=1),
    "min": lambda per_frame: per_frame.amin(dim=1),
}


class RewardError(RuntimeError):
    """A reward model failed; the message names the model, the prompt and the sample."""


@dataclass(frozen=True)
class Reward:
    """A model with its place in the recipe; `second` scores the same videos again, by other options."""

    model: RewardModel
    weight: float
    aggregate: str
    second: RewardModel | None = None


def build_reward(name: str, reward: RewardConfig, device: torch.device, twice: bool = False) -> Reward:
    """The reward model behind a recipe's entry.

    Args:
        twice: build the second model, too, where the entry has one.

    Raises:
        ConfigError: no such name or dotted path, or the constructor refused its options.
    """
    path = REWARDS.get(reward.model, reward.model)
    module, _, attribute = path.partition(":")
    if not attribute:
        raise ConfigError(
            f"rewards.{name}.model is {reward.model!r}; it must be one of {sorted(REWARDS)} or a dotted path "
            "like 'my_pkg.rewards:MyReward'"
        )
    try:
        factory = getattr(importlib.import_module(module), attribute)
        model = factory(**_options(reward.options, device, factory))
        second = None
        if twice and reward.second is not None:
            second = factory(**_options({**reward.options, **reward.second}, device, factory))
    except (ImportError, AttributeError, TypeError, OSError) as error:
        raise ConfigError(f"rewards.{name} ({path}) could not be built: {error}") from error
    return Reward(model, reward.weight, reward.aggregate, second)


def _options(options: Mapping[str, Any], device: torch.device, factory: Callable[..., Any]) -> dict[str, Any]:
    takes_device = "device" in inspect.signature(factory).parameters
    return {**options, **({"device": device} if takes_device else {})}


@dataclass(frozen=True)
class ScoredChunk:
    """What a rank's videos of one chunk earned: rows of scores per frame by reward name, and whose they are.

    `second` holds the second models' scores, by the names of the rewards that have one.
    """

    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]
    scores: Mapping[str, Float[Tensor, "samples _"]]
    second: Mapping[str, Float[Tensor, "samples _"]] = field(default_factory=dict)


class RewardSuite:
    """The rewards of a recipe, by the names that it gives them."""

    def __init__(self, rewards: Mapping[str, RewardConfig], device: torch.device, twice: bool = False):
        self.rewards = {name: build_reward(name, reward, device, twice) for name, reward in rewards.items()}

    @property
    def versions(self) -> dict[str, str]:
        return {name: reward.model.version for name, reward in self.rewards.items()}

    @property
    def weights(self) -> dict[str, float]:
        return {name: reward.weight for name, reward in self.rewards.items()}

    @torch.no_grad()
    def score(self, chunk: RolloutChunk, texts: Sequence[str]) -> ScoredChunk:
        """Scores per frame of each model, higher is better, fp32.

        Args:
            texts: of the step's prompts, by the chunk's prompt rows.

        Raises:
            RewardError: a model returned something else than a row of scores per video.
        """
        own_texts = [texts[row] for row in chunk.prompt_rows.tolist()]
        scores = {name: _score(name, reward.model, chunk.videos, own_texts) for name, reward in self.rewards.items()}
        second = {
            name: _score(name, reward.second, chunk.videos, own_texts)
            for name, reward in self.rewards.items()
            if reward.second is not None
        }
        return ScoredChunk(chunk.prompt_rows, chunk.sample_index, scores, second)

    @torch.no_grad()
    def score_images(
        self, images: Float[Tensor, "prompts 3 height width"], texts: Sequence[str]
    ) -> dict[str, Float[Tensor, "prompts"]]:
        """What a video of one frame would earn, by reward name: conditioning images, or videos' first frames."""
        return {
            name: AGGREGATES[reward.aggregate](_score(name, reward.model, images[:, None], texts))
            for name, reward in self.rewards.items()
        }

    def gather(self, chunks: Sequence[ScoredChunk], prompts: PromptBatch, group_size: int, mesh: Mesh) -> Rewards:
        """All ranks' scores as prompts x group, the same on every rank.

        Raises:
            RewardError: a score is not finite; on every rank, naming the reward, the prompt and the sample.
        """
        total = len(prompts) * group_size
        items = torch.cat([chunk.prompt_rows * group_size + chunk.sample_index for chunk in chunks]).tolist()

        def gathered(name: str, scores: Sequence[Tensor]) -> Tensor:
            rows = mesh.gather(torch.cat([score.to(mesh.device) for score in scores]), items, total)
            _check_finite(name, rows, prompts, group_size)
            return rows

        per_frame, by_name, second = {}, {}, {}
        for name, reward in self.rewards.items():
            aggregate = AGGREGATES[reward.aggregate]
            rows = gathered(name, [chunk.scores[name] for chunk in chunks])
            per_frame[name] = rows.unflatten(0, (len(prompts), group_size))
            by_name[name] = aggregate(rows).unflatten(0, (len(prompts), group_size))
            if reward.second is not None:
                again = gathered(f"{name}.second", [chunk.second[name] for chunk in chunks])
                second[name] = aggregate(again).unflatten(0, (len(prompts), group_size))
        weighted = [self.weights[name] * scores for name, scores in by_name.items()]
        return Rewards(by_name=by_name, total=torch.stack(weighted).sum(dim=0), per_frame=per_frame, second=second)


def _score(
    name: str, model: RewardModel, videos: Videos, texts: Sequence[str]
) -> Float[Tensor, "samples scored_frames"]:
    rows = model(videos, texts)
    if rows.ndim != 2 or rows.shape[0] != len(texts) or rows.shape[1] == 0:
        raise RewardError(
            f"reward {name!r} returned the shape {tuple(rows.shape)} for {len(texts)} videos; it must be "
            f"({len(texts)}, scored frames)"
        )
    return rows.float() if model.higher_is_better else -rows.float()


def _check_finite(name: str, rows: Tensor, prompts: PromptBatch, group_size: int) -> None:
    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        row, frame = bad[0].tolist()
        prompt, sample = divmod(row, group_size)
        raise RewardError(
            f"reward {name!r} scored {float(rows[row, frame])} for sample {sample} of prompt {prompts.texts[prompt]!r} "
            f"(id {int(prompts.ids[prompt])}), scored frame {frame}; all ranks stop, nothing was updated with it"
        )
