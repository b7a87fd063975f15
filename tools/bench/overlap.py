"""Overlap of scoring and rollout: seconds of both together, relative to the longer of the two.

The reward sleeps for as long as the rollout of a chunk takes, like a model on another device or machine. A reward on
the same cores would compete for them, and no schedule could save time.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

from bpgo_video.config.bpgo import Config, PriorConfig, RewardConfig
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.rewards import Clips, FrameSampling, FrameScores
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.sampling import sample_and_score
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch
from tools.bench.timing import seconds

CHUNKS = 8
ROUNDS = 5


class SleepingReward:
    """Brightness, returned after `seconds`."""

    name, version, range = "waits", "1", (0.0, 1.0)
    higher_is_better, differentiable, kind, frames = True, False, "test", FrameSampling()
    seconds = 0.0

    def __call__(self, clips: Clips) -> FrameScores:
        time.sleep(self.seconds)
        return FrameScores(clips.videos.mean(dim=(2, 3, 4)), clips.times)


def in_chunks(config: Config) -> Config:
    """The recipe with one sleeping reward and a rollout in CHUNKS chunks per rank."""
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    return replace(
        config,
        rewards={"waits": RewardConfig(model="tools.bench.overlap:SleepingReward")},
        prior=PriorConfig(kind="constant"),
        rollout=replace(config.rollout, micro_batch_size=max(1, samples // CHUNKS)),
    )


def step(session: Session, prompts: PromptBatch, ahead: int) -> dict[str, float]:
    """Seconds of rollout and reward together and of each, and the ratio of the whole to the longer one."""
    rollout = replace(session.config.rollout, score_ahead=ahead)
    session = replace(session, config=replace(session.config, rollout=rollout))
    watch = Stopwatch(Heartbeat(session.mesh, timeout=60), 0)
    whole = seconds(lambda: sample_and_score(session, prompts, 0, watch))
    parts = {"rollout": watch.seconds["rollout"], "reward": watch.seconds["reward_work"]}
    return {"whole": whole, **parts, "over_longer": whole / max(parts.values())}


def overlap(session: Session, prompts: PromptBatch) -> dict[str, Any]:
    """Medians over steps with inline and with concurrent scoring, measured alternately.

    Args:
        session: for a recipe from `in_chunks`, on one rank.
    """
    model = session.suite.rewards["waits"].model
    step(session, prompts, 0)
    model.seconds = step(session, prompts, 0)["rollout"] / CHUNKS  # type: ignore[attr-defined]
    measured: dict[int, list[dict[str, float]]] = {0: [], session.config.rollout.score_ahead: []}
    for _ in range(ROUNDS):
        for ahead, steps in measured.items():
            steps.append(step(session, prompts, ahead))
    inline, concurrent = (
        {name: statistics.median(step[name] for step in steps) for name in steps[0]} for steps in measured.values()
    )
    return {"chunks": CHUNKS, "inline": inline, "beside": concurrent, "bound": 1.05 * (CHUNKS + 1) / CHUNKS}


if __name__ == "__main__":
    raise SystemExit(
        "error: this module is part of the benchmark; run python -m tools.bench --recipe RECIPE.yaml --output DIR"
    )
