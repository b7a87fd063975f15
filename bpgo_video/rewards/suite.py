"""The rewards of a recipe: each scores the videos of a step, and the scores are gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rewards.base import Clips, FrameScores, RewardError, RewardModel, Scores
from bpgo_video.rewards.networks import Backbones
from bpgo_video.rewards.reward import Call, Reward, build_models, describe_samples
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk


@dataclass(frozen=True)
class ScoredChunk:
    """Scores of a rank's videos of one chunk by some of the rewards, by reward name; higher is better.

    Attributes:
        frames: of each scored frame, or one column; of the first scoring.
        videos: aggregated, a column for each scoring; nan from the second on for videos that are scored once.
        stds: of their errors; nan where the model states none.
    """

    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]
    frames: dict[str, FrameScores] = field(default_factory=dict)
    videos: dict[str, Float[Tensor, "samples scorings"]] = field(default_factory=dict)
    stds: dict[str, Float[Tensor, "samples scorings"]] = field(default_factory=dict)


class RewardSuite:
    """The rewards of a recipe, by name.

    Args:
        fps: of the videos.
        backbones: networks shared with another suite.
    """

    def __init__(
        self, rewards: Mapping[str, RewardConfig], device: torch.device, fps: float,
        backbones: Backbones | None = None,
    ):  # fmt: skip
        self.fps = fps
        shared = backbones or Backbones()
        self.rewards: dict[str, Reward] = {}
        for name, config in rewards.items():
            model, *rescorers = build_models(name, config, device, shared)
            self.rewards[name] = Reward(model, config, tuple(rescorers))
            if config.offload and not modules_of([model]):
                raise ConfigError(f"rewards.{name}: {config.model} holds no torch.nn.Module; set offload: false")
        self._offload()

    @property
    def versions(self) -> dict[str, str]:
        return {name: reward.version for name, reward in self.rewards.items()}

    @property
    def trained_versions(self) -> dict[str, str]:
        """Of the rewards that train."""
        return {name: version for name, version in self.versions.items() if self.weights[name]}

    @property
    def weights(self) -> dict[str, float]:
        return {name: reward.config.weight for name, reward in self.rewards.items()}

    @property
    def groupwise(self) -> bool:
        """Whether a reward compares the samples of a prompt."""
        return any(reward.groupwise for reward in self.rewards.values())

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Offloaded models are on their device inside the block, and back on the CPU after it unless it failed."""
        # All models: one may share a network with a model that another suite offloads.
        for module in modules_of(model for reward in self.rewards.values() for model in reward.models):
            if module in OFFLOADED:
                module.to(OFFLOADED.pop(module))
        yield
        self._offload()

    def _offload(self) -> None:
        offloading = [reward for reward in self.rewards.values() if reward.config.offload]
        for module in modules_of(model for reward in offloading for model in reward.models):
            tensor = next(chain(module.parameters(), module.buffers()), None)
            if tensor is not None:
                OFFLOADED.setdefault(module, tensor.device)  # two offloaded models may share it
            module.to("cpu")

    @torch.no_grad()
    def score(
        self,
        chunk: RolloutChunk,
        prompts: PromptBatch,
        on_call: Callable[[Call], object] = lambda call: None,
        groupwise: bool = False,
    ) -> ScoredChunk:
        """Scores of each model, higher is better, fp32, on the CPU.

        Args:
            on_call: receives each call before it is made.
            groupwise: score by the rewards that compare samples, of which the chunk holds whole groups; else by the
                others.

        Raises:
            RewardError: as `Call.score`.
        """
        rows, clips = chunk.prompt_rows, self._clips(chunk, prompts)
        clips = replace(clips, groups=rows) if groupwise else clips

        def scores(name: str, timeout: float, model: RewardModel, videos: Tensor) -> FrameScores:
            call = Call(name, timeout, prompts, rows[videos], chunk.sample_index[videos])
            on_call(call)
            return call.score(model, clips if len(videos) == len(clips) else clips.select(videos))

        everyone = torch.arange(len(clips))
        again = everyone if prompts.again is None else everyone[prompts.again[rows]]
        scored = ScoredChunk(rows, chunk.sample_index)
        for name, reward in self.rewards.items():
            if reward.groupwise != groupwise:
                continue
            unknown = torch.full((len(clips), len(reward.models)), torch.nan)
            scored.videos[name], scored.stds[name] = unknown.clone(), unknown
            for number, model in enumerate(reward.models if len(again) else [reward.model]):
                called = f"{name}.rescorings[{number - 1}]" if number else name
                which = again if number else everyone
                found = scores(called, reward.config.timeout, model, which)
                scored.frames.setdefault(name, found)
                scored.videos[name][which, number] = reward.aggregate(found.values)
                if (std := reward.aggregate_std(found.std)) is not None:
                    scored.stds[name][which, number] = std
        return scored

    def _clips(self, chunk: RolloutChunk, prompts: PromptBatch) -> Clips:
        rows = chunk.prompt_rows
        images = None if prompts.images is None else prompts.images[rows].to(chunk.videos.device)
        texts = tuple(prompts.texts[row] for row in rows.tolist())
        return Clips(chunk.videos, self.fps, texts, images, chunk.audio)

    def total(self, chunk: RolloutChunk, prompts: PromptBatch) -> Float[Tensor, "samples"]:
        """sum_r weight_r R_r of each video, differentiable in its pixels; R_r is the mean of the reward's scorings.

        Raises:
            RewardError: as `Call.score`, or a score has no gradient.
        """
        clips, terms = self._clips(chunk, prompts), []
        for name, reward in self.rewards.items():
            if not reward.config.weight:
                continue
            call = Call(name, reward.config.timeout, prompts, chunk.prompt_rows, chunk.sample_index)
            scores = [reward.aggregate(call.score(model, clips).values) for model in reward.models]
            if torch.is_grad_enabled() and not all(values.requires_grad for values in scores):
                raise RewardError(f"{call} returned scores without a gradient; set its `differentiable` to False")
            terms.append(reward.config.weight * torch.stack(scores).mean(dim=0))
        return torch.stack(terms).sum(dim=0)

    def require_differentiable(self) -> None:
        """
        Raises:
            ConfigError: names the rewards of weight above 0 whose scores have no gradient.
        """
        trained = {name: reward for name, reward in self.rewards.items() if reward.config.weight}
        without = [
            f"{name} ({reward.config.model})"
            for name, reward in trained.items()
            if not all(getattr(model, "differentiable", False) for model in reward.models)
        ]
        if without:
            raise ConfigError(
                f"loss.objective is 'draft', but these rewards are not differentiable: {', '.join(without)}; set their "
                "weight to 0, take another reward, or the objective 'policy_gradient'"
            )

    @torch.no_grad()
    def score_images(self, prompts: PromptBatch, num_frames: int, mesh: Mesh) -> dict[str, Float[Tensor, "prompts"]]:
        """Score of each prompt's conditioning image as a still video of `num_frames`, by reward; gathered.

        Rewards that compare samples give none.
        """
        if prompts.images is None:
            return {}
        rows, scored = torch.tensor(mesh.share(len(prompts), 1)).flatten(), []
        for row in rows.split(1):
            still = prompts.images[row, None].to(mesh.device).expand(-1, num_frames, -1, -1, -1)  # without a copy
            scored.append(self.score(RolloutChunk((), still, row, torch.zeros_like(row)), replace(prompts, again=None)))
        alone = [name for name, reward in self.rewards.items() if not reward.groupwise]
        by_name = {name: torch.cat([chunk.videos[name].mean(dim=1) for chunk in scored]) for name in alone}
        return {
            name: mesh.gather(scores.to(mesh.device), rows.tolist(), len(prompts)) for name, scores in by_name.items()
        }

    def gather(self, chunks: Sequence[ScoredChunk], prompts: PromptBatch, group_size: int, mesh: Mesh) -> Rewards:
        """All ranks' scores as prompts x group, the same on every rank; each video is in one chunk by each reward.

        Raises:
            RewardError: a score is not finite, or the numbers of scored frames differ; on every rank, with the reward,
                the prompt and the sample.
        """
        shape = (len(prompts), group_size)
        per_frame, times, scorings, by_name, stds = {}, {}, {}, {}, {}
        for name, reward in self.rewards.items():
            mine = [chunk for chunk in chunks if name in chunk.frames]
            gathered = partial(_gathered, mine, len(prompts), group_size, mesh)
            scores, times[name] = [chunk.frames[name].values for chunk in mine], mine[0].frames[name].times
            widths = gathered(torch.full((len(values),), values.shape[1]) for values in scores)
            _check_widths(name, widths, prompts, group_size)
            per_frame[name] = gathered(scores)
            _check_finite(name, per_frame[name], prompts, group_size)
            every = gathered(chunk.videos[name] for chunk in mine)
            by_name[name] = every[:, 0].unflatten(0, shape)
            std = std_of_mean(gathered(chunk.stds[name] for chunk in mine), every.isfinite())
            if bool(std.isfinite().all()):
                stds[name] = std.unflatten(0, shape)
            if reward.rescorers:
                again = torch.ones(len(prompts), dtype=torch.bool) if prompts.again is None else prompts.again
                once = ~again.repeat_interleave(group_size).to(every.device)
                _check_finite(f"{name}.rescorings", every[:, 1:].masked_fill(once[:, None], 0.0), prompts, group_size)
                scorings[name] = every.unflatten(0, shape)
                by_name[name] = scorings[name].nanmean(dim=2)
        total = torch.stack([self.weights[name] * scores for name, scores in by_name.items()]).sum(dim=0)
        by_frame = {name: values.unflatten(0, shape) for name, values in per_frame.items()}
        return Rewards(by_name, total, by_frame, times, scorings, stds)


def _gathered(
    chunks: Sequence[ScoredChunk], prompts: int, group_size: int, mesh: Mesh, parts: Iterable[Tensor]
) -> Tensor:
    """All ranks' rows, one for each item of prompts x group; `parts` has the rows of each chunk."""
    items = torch.cat([chunk.prompt_rows * group_size + chunk.sample_index for chunk in chunks]).tolist()
    return mesh.gather(torch.cat(list(parts)).to(mesh.device), items, prompts * group_size)


def std_of_mean(
    std: Float[Tensor, "samples scorings"], scored: Bool[Tensor, "samples scorings"]
) -> Float[Tensor, "samples"]:
    """sqrt(sum_k s_k^2)/K of each video's K scorings, which err independently; nan if one of them states no std."""
    return std.masked_fill(~scored, 0.0).square().sum(dim=1).sqrt() / scored.sum(dim=1)


def _check_widths(name: str, widths: Tensor, prompts: PromptBatch, group_size: int) -> None:
    for row in (widths != widths[0]).nonzero().flatten().tolist():
        sample = describe_samples(prompts, row // group_size, [row % group_size])
        counts = f"{int(widths[0])} scores for the first sample and {int(widths[row])} for {sample}"
        raise RewardError(f"reward {name!r} returned {counts}; all videos of a step need equally many scored frames")


def _check_finite(name: str, values: Scores, prompts: PromptBatch, group_size: int) -> None:
    for row, frame in (~values.isfinite()).nonzero().tolist():
        sample = describe_samples(prompts, row // group_size, [row % group_size])
        score = f"reward {name!r} scored {float(values[row, frame])} for {sample}, scored frame {frame}"
        raise RewardError(f"{score}; all ranks stop before an update with it")


MAX_DEPTH = 4  # of attributes of attributes that are searched for modules
OFFLOADED: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()  # modules on the CPU now, and their device


def modules_of(models: Iterable[RewardModel]) -> list[nn.Module]:
    """The modules that reward models are or hold, each once."""
    modules = chain.from_iterable(_modules_in(model, MAX_DEPTH) for model in models)
    return list({id(module): module for module in modules}.values())


def _modules_in(thing: object, depth: int) -> Iterator[nn.Module]:
    if isinstance(thing, nn.Module):
        yield thing
    elif depth and not isinstance(thing, type | ModuleType | str | bytes):
        by_name = thing if isinstance(thing, Mapping) else getattr(thing, "__dict__", {})
        for part in list(thing if isinstance(thing, Sequence) else by_name.values()):
            yield from _modules_in(part, depth - 1)
