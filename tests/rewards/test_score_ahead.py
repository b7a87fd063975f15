"""Scoring ahead of the rollout: identical bits and order, bounded memory, and errors of reward models."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.policies import Policy
from bpgo_video.rewards import Clips, FrameScores
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.score_ahead import ScoreAhead
from bpgo_video.rewards.suite import OFFLOADED, RewardSuite, modules_of
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.sampling import sample, sample_and_score
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk, Trajectory
from tests.rewards.toys import CPU, MESH, PROMPTS, Weighing, chunks_of, suite_of


def scored(suite: RewardSuite, ahead: int, chunks: Iterator[RolloutChunk] | None = None) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with ScoreAhead(suite, PROMPTS, ahead, CPU) as scoring:
        for chunk in chunks_of(each=1) if chunks is None else chunks:
            scoring.put(chunk)
        return [actual.frames["toy"].values for actual in scoring.scores()]


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_scores_and_their_order_equal_those_without_a_thread(ahead: int) -> None:
    torch.manual_seed(1)
    expected = [suite_of("Drawing").score(chunk, PROMPTS).frames["toy"].values for chunk in chunks_of(each=1)]
    assert len(expected) == 4
    for one, alone in zip(scored(suite_of("Drawing"), ahead), expected, strict=True):
        assert torch.equal(one, alone)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_videos_are_freed_after_scoring_and_few_are_in_memory(ahead: int) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def watched() -> Iterator[RolloutChunk]:
        nonlocal most
        for chunk in chunks_of(videos=5, each=1):
            fresh = replace(chunk, videos=chunk.videos.clone())
            alive.add(fresh.videos)
            del chunk
            most = max(most, len(alive))
            yield fresh
            del fresh

    with ScoreAhead(suite_of("Brightness", options={"seconds": 0.02}), PROMPTS, ahead, CPU) as scoring:
        chunks = watched()
        while (chunk := next(chunks, None)) is not None:
            scoring.put(chunk)
            del chunk
        assert len(scoring.scores()) == 10
        assert not alive
    assert most == ahead + 1


def test_scoring_and_the_rollout_overlap() -> None:
    """Each chunk is scored after the next chunk is sampled, and the last one after sampling has ended."""
    sampled, came_in_time = threading.Semaphore(0), []

    def wait(clips: Clips) -> FrameScores:
        came_in_time.append(all(sampled.acquire(timeout=30) for _ in range(1 if came_in_time else 2)))
        return FrameScores(clips.videos.mean(dim=(2, 3, 4)), clips.times)

    suite = suite_of("Brightness")
    object.__setattr__(suite.rewards["toy"], "model", Mock(side_effect=wait))
    with ScoreAhead(suite, PROMPTS, 1, CPU) as scoring:
        for chunk in chunks_of(videos=5, each=1):
            sampled.release()
            scoring.put(chunk)
        sampled.release()
        assert len(scoring.scores()) == 10
    assert came_in_time == [True] * 10


def test_chunks_of_the_next_step_are_scored_after_those_of_this_one_and_few_are_in_memory() -> None:
    """With room for a step's chunks, two steps hold no more than that and the one just sampled."""
    torch.manual_seed(1)
    expected = [suite_of("Drawing").score(chunk, PROMPTS).frames["toy"].values for chunk in 2 * [*chunks_of(each=1)]]
    assert len(expected) == 8
    suite, alive, most = suite_of("Drawing", options={"seconds": 0.02}), weakref.WeakSet[torch.Tensor](), 0
    torch.manual_seed(1)
    first = ScoreAhead(suite, PROMPTS, 4, CPU)
    second = ScoreAhead(suite, PROMPTS, 4, CPU, after=first)
    for scoring in (first, second):
        with scoring:
            for chunk in chunks_of(each=1):
                fresh = replace(chunk, videos=chunk.videos.clone())
                alive.add(fresh.videos)
                most = max(most, len(alive))
                scoring.put(fresh)
                del fresh
    assert len(first.scores()) == 4, "which the last chunk of the second waits for"
    found = [scored.frames["toy"].values for scored in first.scores() + second.scores()]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert most <= 5
    assert not alive


def test_a_model_that_fails_ends_the_rollout_of_the_next_step() -> None:
    suite = suite_of("Breaking")
    first = ScoreAhead(suite, PROMPTS, 2, CPU)
    with first:
        for chunk in chunks_of():
            first.put(chunk)

    def next_step() -> None:
        with ScoreAhead(suite, PROMPTS, 2, CPU, after=first) as second:
            for chunk in chunks_of():
                second.put(chunk)
            first.scores()

    with pytest.raises(RewardError, match="'toy' on samples 0, 1 of prompt 'second'"):
        next_step()


WHOSE = r"samples 0, 1 of prompt 'second' \(id 6\)"


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", rf"reward 'toy' on {WHOSE} failed: KeyError: 'no such weight'"),
        ("hangs", rf"reward 'toy' on {WHOSE} has not answered within its timeout of 0.3 s"),
        ("one video too few", rf"reward 'toy' on {WHOSE} returned the shape \(1, 3\) for 2 videos"),
        ("no frames", rf"reward 'toy' on {WHOSE} returned the shape \(2, 0\) for 2 videos"),
        ("no times", rf"reward 'toy' on {WHOSE} returned 3 scores a video with no frame times"),
        ("nan", r"reward 'toy' scored nan for sample 1 of prompt 'second' \(id 6\), scored frame 2"),
        ("other frames", r"'toy' returned 3 scores for the first sample and 2 for sample 0 of prompt 'second' \(id 6"),
    ],
)
def test_a_model_that_fails_ends_the_step_with_prompt_and_sample(how: str, message: str, ahead: int) -> None:
    suite = suite_of("Breaking", options={"how": how}, timeout=0.3)

    def step() -> Rewards:
        with ScoreAhead(suite, PROMPTS, ahead, CPU) as scoring:
            for chunk in chunks_of():
                scoring.put(chunk)
            return suite.gather(scoring.scores(), PROMPTS, 2, MESH)

    started = time.monotonic()
    with pytest.raises(RewardError, match=message):
        step()
    assert time.monotonic() - started < 3


def test_a_rollout_that_fails_does_not_wait_for_scores() -> None:
    def broken() -> Iterator[RolloutChunk]:
        yield from chunks_of()
        raise FloatingPointError("the rollout")

    suite, others, started = suite_of("Brightness", options={"seconds": 0.5}), threading.enumerate(), time.monotonic()
    with pytest.raises(FloatingPointError, match="the rollout"):
        scored(suite, 2, broken())
    assert time.monotonic() - started < 0.4
    (thread,) = [thread for thread in threading.enumerate() if thread not in others]
    thread.join(0.7)
    assert not thread.is_alive()
    assert suite.rewards["toy"].model.received.total() <= 1, "the second chunk is no longer scored"


def test_the_thread_has_the_settings_of_its_caller() -> None:
    suite = suite_of("Brightness")
    scored(suite, 2, chunks_of(each=4))
    assert suite.rewards["toy"].model.contexts == [(torch.get_num_threads(), False, "scoring")]


def test_offloaded_models_are_on_the_cpu_between_scorings(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake device, since there is only a CPU."""
    places: dict[int, str] = {}
    monkeypatch.setattr(torch.nn.Linear, "to", lambda self, device: places.update({id(self): str(device)}))
    offloaded, other = suite_of("Weighing", offload=True), suite_of("Weighing")
    (network,) = modules_of([offloaded.rewards["toy"].model])
    assert places == {id(network): "cpu"}, "from the start"
    OFFLOADED[network] = torch.device("meta")
    with offloaded.on_device():
        assert places == {id(network): "meta"}
    assert places == {id(network): "cpu"}
    with other.on_device():
        assert len(places) == 1, "a model that is not offloaded is not moved"
    OFFLOADED[network] = torch.device("meta")
    object.__setattr__(other.rewards["toy"], "model", offloaded.rewards["toy"].model)
    with other.on_device():
        assert places == {id(network): "meta"}, "where two suites share a network, each finds it on the device"


def test_networks_are_found_in_nested_attributes() -> None:
    model = Weighing()
    layer = model.network
    model.network = {"parts": [SimpleNamespace(backbone=SimpleNamespace(network=layer))]}
    model.again = layer
    assert modules_of([model]) == [layer]


def test_a_model_without_modules_cannot_be_offloaded() -> None:
    with pytest.raises(ConfigError, match=r"Brightness holds no torch\.nn\.Module"):
        suite_of("Brightness", offload=True)


def session_of(policy: Policy, recipe: Config, toy: str = "Drawing", **rollout: object) -> tuple[Session, PromptBatch]:
    """Of two prompts of four samples, two samples per chunk."""
    settings = {"group_size": 4, "prompts_per_step": 2, "micro_batch_size": 2, **rollout}
    config = replace(
        recipe,
        rollout=replace(recipe.rollout, **settings),
        sampler=replace(recipe.sampler, num_steps=3, train_steps="all"),
    )
    texts = ("a red circle moving left", "a blue object")
    prompts = PromptBatch(torch.tensor([1, 2]), texts, policy.encode(texts), policy.encode([""]))
    parts = {"config": config, "mesh": MESH, "policy": policy, "suite": suite_of(toy)}
    return Mock(spec=Session, rollout_weights=nullcontext, sampling_weights=nullcontext, **parts), prompts


def step_of(
    policy: Policy, recipe: Config, toy: str = "Drawing", **rollout: object
) -> tuple[list[Trajectory], Rewards, Stopwatch]:
    """One rollout of eight videos."""
    session, prompts = session_of(policy, recipe, toy, **rollout)
    torch.manual_seed(1)
    watch = Stopwatch(Heartbeat(MESH, timeout=60), 0)
    return *sample_and_score(session, prompts, 0, watch), watch


def test_a_step_that_is_sampled_ahead_has_the_videos_and_scores_of_one_that_is_not(
    policy: Policy, recipe: Config
) -> None:
    session, prompts = session_of(policy, recipe, sample_ahead=True)
    watch = Stopwatch(Heartbeat(MESH, timeout=60), 0)
    torch.manual_seed(1)
    expected = [sample_and_score(session, prompts, step, watch) for step in range(2)]
    torch.manual_seed(1)
    first = sample(session, prompts, 0, watch)
    second = sample(session, prompts, 1, watch, after=first)
    assert (first.age, second.age) == (0, 1)
    for rollout, (trajectories, rewards) in zip((first, second), expected, strict=True):
        assert torch.equal(rollout.rewards(session, watch).per_frame["toy"], rewards.per_frame["toy"])
        for one, other in zip(rollout.trajectories, trajectories, strict=True):
            assert torch.equal(one.latents, other.latents)
    assert not torch.equal(expected[0][1].total, expected[1][1].total)


def test_a_rollout_is_sampled_with_the_weights_that_the_session_samples_with(
    policy: Policy, recipe: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with others, and they are gone when it ends; under ZeRO-3 they are swapped in before any is gathered."""
    session, prompts = session_of(policy, recipe)
    entered: list[str] = []

    @contextmanager
    def block(name: str) -> Iterator[None]:
        entered.append(name)
        yield
        assert entered.pop() == name

    velocity, seen = policy.velocity, []

    def recorded(*arguments: Any) -> torch.Tensor:
        seen.append(tuple(entered))
        return velocity(*arguments)

    session.sampling_weights, session.rollout_weights = partial(block, "swapped"), partial(block, "gathered")
    monkeypatch.setattr(policy, "velocity", recorded)
    sample_and_score(session, prompts, 0, Stopwatch(Heartbeat(MESH, timeout=60), 0))
    assert set(seen) == {("swapped", "gathered")}
    assert not entered


def test_a_step_does_not_depend_on_scoring_ahead_or_offloading(policy: Policy, recipe: Config) -> None:
    inline, expected, _ = step_of(policy, recipe, score_ahead=0)
    ahead, rewards, watch = step_of(policy, recipe, score_ahead=2, offload_trajectories=True)
    assert torch.equal(rewards.per_frame["toy"], expected.per_frame["toy"])
    for one, other in zip(inline, ahead, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.log_probs.isfinite(), other.log_probs.isfinite())
        assert torch.equal(one.log_probs.nan_to_num(), other.log_probs.nan_to_num())
    assert watch.seconds["reward_work"] > 0
    assert watch.seconds["rollout"] > watch.seconds["reward"]
