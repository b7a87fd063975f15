"""Device placement: no CPU tensor is mixed with device tensors; the meta device replaces a GPU.

Operations on the meta device check devices as on a GPU, and compute nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import sample_chunks
from tests.families import CASES

DEVICE = torch.device("meta")
ASK_FOR_NUMBERS = {"mochi", "hunyuan15", "hunyuan15_image"}  # autocast and counts of real tokens do not work on meta


@pytest.mark.parametrize("name", sorted(set(CASES) - ASK_FOR_NUMBERS))
def test_rollout_decoding_and_replay_stay_on_the_device(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.write(tmp_path / "pipeline")
    policy, config = case.policy(tmp_path / "pipeline"), case.recipe(tmp_path / "pipeline")
    scales = {"guidance_scale": case.guidance_scale, "guidance_scale_2": case.guidance_scale_2}
    config = replace(config, sampler=replace(config.sampler, num_steps=3, **scales))
    prompts = case.prompts(policy, config)
    for part in (*policy.transformers.values(), policy.pipeline.vae):
        part.to(DEVICE)

    chunk = next(
        sample_chunks(
            training_denoiser(policy, config), prompts, Mesh(0, 1, DEVICE), group_size=2, micro_batch_size=2,
            latent_shape=policy.latent_shape(config.video), key=(0,), trained_steps=lambda prompt: (0, 1),
        )
    )  # fmt: skip
    flat = GroupAdvantages(torch.zeros(len(prompts), 2), None, torch.ones(len(prompts)), {})
    config = replace(config, bpgo=replace(config.bpgo, zeta=0.0))
    objective = Replay(policy, config, prompts, flat, 0, DEVICE)
    loss = objective.loss(chunk.trajectories[0], 1)
    loss.value.backward()
    assert chunk.videos.device == loss.value.device == DEVICE
    assert all(value.device == DEVICE for value in loss.metrics.values())


def test_a_tensor_left_on_the_cpu_is_detected() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(2, device=DEVICE) + torch.empty(2)
