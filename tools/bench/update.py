"""Seconds of an update under each ZeRO stage, relative to a loop of plain PyTorch: part of `make bench`.

The plain loop replays the same trajectories with the same objective, averages gradients in one all-reduce, clips them,
and steps torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.updates import Learner, optimise
from bpgo_video.training.estimation import estimate_advantages
from bpgo_video.training.inputs import check_inputs
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.sampling import sample_and_score
from bpgo_video.training.session import build_session, sampling_policy
from tools.bench.timing import in_turn

WAYS: dict[str, tuple[int, dict[str, str]]] = {  # ZeRO's stage, and settings of `optim`
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3, sharded": (3, {"parameters": "sharded"}),
    "zero3, gathered": (3, {"parameters": "gathered"}),
    "zero3, gathered, averaged once": (3, {"parameters": "gathered", "average": "update"}),
}


class PlainLearner:
    """AdamW of torch on whole weights, with gradients averaged once an update."""

    replaying = nullcontext

    def __init__(self, module: torch.nn.Module, config: Config, mesh: Mesh) -> None:
        self.parameters = list(module.requires_grad_().parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.optim.learning_rate)
        self.max_norm, self.ranks = config.optim.max_grad_norm, mesh.world_size

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.ranks).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def updates(config: Config, mesh: Mesh, heartbeat: Heartbeat, rounds: int) -> dict[str, Any]:
    """Median seconds of an update with all trained steps, and their ratios to the plain loop's."""
    config = replace(config, optim=replace(config.optim, updates_per_rollout=1))
    _, shards = check_inputs(config, mesh)
    works: dict[str, Callable[[], object]] = {}
    for name, (stage, settings) in WAYS.items():
        changed = replace(config, optim=replace(config.optim, **settings))
        ds_config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        session = build_session(changed, mesh, ds_config, shards)
        prompts = next(session.batches())
        trajectories, rewards = sample_and_score(session, prompts, 0, Stopwatch(heartbeat, 0))
        rest = (changed, prompts, estimate_advantages(session, prompts, rewards), 0, mesh.device)
        works[name] = partial(update, session.engine, Replay(session.policy, *rest), trajectories)
    policy = sampling_policy(config, {"zero_optimization": {"stage": 0}}, mesh)
    works["plain PyTorch"] = partial(
        update, PlainLearner(policy.transformers, config, mesh), Replay(policy, *rest), trajectories
    )
    times = in_turn(works, rounds)
    plain = times["plain PyTorch"]
    return {"seconds": times, "over_plain": {name: seconds / plain for name, seconds in times.items()}}


def update(learner: Learner, objective: Replay, trajectories: Any) -> None:
    optimise(learner, objective, trajectories, updates_per_rollout=1)
