"""Toy rewards, prompts and chunks for the tests of this folder."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from bpgo_video.config.bpgo import RewardConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rewards import Clips, FrameSampling, FrameScores, RewardModel
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.types import PromptBatch, RolloutChunk

CPU = torch.device("cpu")
MESH = Mesh(0, 1, CPU)
PROMPTS = PromptBatch(torch.tensor([5, 6]), ("first", "second"), {})


class Brightness(RewardModel):
    """Mean of each of the first `columns` frames, plus `low`; counts calls by the first video's text."""

    name, version, kind = "brightness", "7", "test"

    def __init__(self, low: float = 0.0, columns: int | None = None, seconds: float = 0.0) -> None:
        self.low, self.columns, self.seconds = low, columns, seconds
        self.received: Counter[str] = Counter()
        self.contexts: list[tuple[int, bool, str]] = []

    def __call__(self, clips: Clips) -> FrameScores:
        self.received[clips.texts[0]] += 1
        self.contexts.append((torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name))
        time.sleep(self.seconds)
        values = self.low + clips.videos.mean(dim=(2, 3, 4))
        return FrameScores(values[:, : self.columns], clips.times[: self.columns])


class Darkness(Brightness):
    higher_is_better = False
    frames = FrameSampling(fps=4.0)


class Uncertain(Darkness):
    """Darkness that states the std of its errors: `std` for each frame in turn, or what else is given."""

    def __init__(self, std: tuple[float, ...] = (0.3, 0.4, 0.0), low: float = 0.0) -> None:
        super().__init__(low)
        self.std = torch.tensor(std)

    def __call__(self, clips: Clips) -> FrameScores:
        scores = super().__call__(clips)
        vars(scores)["std"] = self.std.expand(len(clips), -1)  # without the constructor, which checks shapes in tests
        return scores


class Drawing(Brightness):
    """Adds a draw of torch's global generator, so that scores depend on the order of calls."""

    def __call__(self, clips: Clips) -> FrameScores:
        actual = super().__call__(clips)
        return FrameScores(actual.values + torch.rand(len(clips), 1), actual.times)


class Breaking(Brightness):
    """Fails for the second prompt, in the given way."""

    def __init__(self, how: str = "raises"):
        super().__init__()
        self.how = how

    def __call__(self, clips: Clips) -> FrameScores:
        scores = super().__call__(clips)
        if "second" not in clips.texts:
            return scores
        if self.how == "raises":
            raise KeyError("no such weight")
        if self.how == "hangs":
            time.sleep(60)
        if self.how == "one video too few":
            return FrameScores(scores.values[1:], scores.times)
        if self.how == "no frames":
            return FrameScores(scores.values[:, :0], clips.times[:0])
        if self.how == "nan":
            scores.values[1, 2] = torch.nan
        if self.how == "other frames":
            return FrameScores(scores.values[:, :2], clips.times[:2])
        return scores if self.how != "no times" else FrameScores(scores.values)


class Ranked(Brightness):
    """Rank of each video's brightness in its group, plus `low`; a score of the whole video."""

    groupwise = True
    hear: Callable[[Clips], object] = staticmethod(lambda clips: None)

    def __call__(self, clips: Clips) -> FrameScores:
        assert clips.groups is not None
        assert len(clips.groups.unique()) == 1
        self.hear(clips)
        ranks = super().__call__(clips).values.mean(dim=1).argsort().argsort().float()
        return FrameScores(self.low + ranks[:, None])


class Weighing(Brightness):
    """Contains a module, as real reward models do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(3, 1)

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(self.network(clips.videos.mean(dim=(3, 4))).squeeze(-1), clips.times)


def toy(name: str, **keys: object) -> RewardConfig:
    return RewardConfig(model=f"tests.rewards.toys:{name}", **keys)


def suite_of(name: str, **keys: object) -> RewardSuite:
    """A suite with one toy, under the name `toy`."""
    return RewardSuite({"toy": toy(name, **keys)}, CPU, fps=2.0)


def chunks_of(prompts: int = 2, videos: int = 2, each: int = 2) -> Iterator[RolloutChunk]:
    """`prompts` x `videos` videos of three frames with different brightness, `each` per chunk."""
    rows, samples = torch.arange(prompts).repeat_interleave(videos), torch.arange(videos).repeat(prompts)
    for part in torch.arange(prompts * videos).split(each):
        brightness = part.float() / (prompts * videos)
        yield RolloutChunk((), brightness.view(-1, 1, 1, 1, 1).expand(-1, 3, 3, 4, 4), rows[part], samples[part])
