"""Which samples are replayed? Those that have an advantage, in micro-batches of the rollout's size.

A sample without one adds nothing to the gradient and costs as much as any other. All ranks take equally many
micro-batches, since ZeRO-3 gathers parameters collectively: where a rank has fewer samples to replay, it fills up with
others of its own, whose advantage is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.types import Trajectory

Place = tuple[Trajectory, int]  # a sample: its micro-batch, and its row there


def worth_replaying(
    trajectories: Sequence[Trajectory], trains: Bool[Tensor, "prompts group"], apart: bool, mesh: Mesh
) -> list[Trajectory]:
    """This rank's micro-batches with the samples that train, and no more of the others than fill them.

    Args:
        trajectories: this rank's own, equally many of equal size on every rank.
        trains: which samples have an advantage; the same on every rank.
        apart: prompts have trained steps of their own, so that a micro-batch has samples of one prompt alone.
    """
    size = len(trajectories[0])
    needed: list[list[Place]] = []
    spare: list[list[Place]] = []
    for places in _together(trajectories, apart):
        training = [place for place in places if _trains(place, trains)]
        ordered = training + [place for place in places if not _trains(place, trains)]
        batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        full = -(-len(training) // size)
        needed += batches[:full]
        spare += batches[full:]
    count = max(1, mesh.largest(len(needed)))
    return [_joined(places) for places in needed + spare[: count - len(needed)]]


def _together(trajectories: Sequence[Trajectory], apart: bool) -> list[list[Place]]:
    """Samples that may share a micro-batch."""
    groups: dict[int, list[Place]] = {}
    for trajectory in trajectories:
        for row, prompt in enumerate(trajectory.prompt_rows.tolist()):
            groups.setdefault(prompt if apart else 0, []).append((trajectory, row))
    return list(groups.values())


def _trains(place: Place, trains: Bool[Tensor, "prompts group"]) -> bool:
    trajectory, row = place
    return bool(trains[trajectory.prompt_rows[row], trajectory.sample_index[row]])


def _joined(places: Sequence[Place]) -> Trajectory:
    def of_each(name: str) -> Tensor:
        return torch.stack([getattr(trajectory, name)[row] for trajectory, row in places])

    first = places[0][0]
    return Trajectory(
        prompt_rows=of_each("prompt_rows"),
        sample_index=of_each("sample_index"),
        trained_steps=first.trained_steps,
        latents=of_each("latents"),
        log_probs=of_each("log_probs"),
        means=None if first.means is None else of_each("means"),
        frame_log_probs=None if first.frame_log_probs is None else of_each("frame_log_probs"),
    )
