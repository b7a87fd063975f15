"""The plain loop that a training step is timed against does the same work: the same videos, log-probs and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies import load_policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.types import Latents, PromptBatch
from tools.bench.plain_loop import PlainLoop

CPU = torch.device("cpu")
ALONE = Mesh(0, 1, CPU)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_the_plain_loop_samples_the_same_videos_and_computes_the_same_gradient(recipe: Config) -> None:
    policy = load_policy(recipe.policy.folder, max_sequence_length=16)
    loss = replace(recipe.loss, step_weights="none")
    sampler = replace(recipe.sampler, num_steps=4, train_steps="all", share_steps="batch")
    rollout = replace(recipe.rollout, group_size=4, micro_batch_size=4, same_start=False)
    config = replace(recipe, rollout=rollout, sampler=sampler, loss=loss, bpgo=replace(recipe.bpgo, zeta=0.0))
    texts = ("a red circle moving left",)
    prompts = PromptBatch(torch.tensor([3]), texts, policy.encode(texts), policy.encode([""]))
    trained = trained_steps_of(policy, config, 0)
    (chunk,) = sample_chunks(
        training_denoiser(policy, config), prompts, ALONE, group_size=4, micro_batch_size=4,
        latent_shape=policy.latent_shape(config.video), key=(0, "rollout", 0), trained_steps=trained,
    )  # fmt: skip
    (trajectory,) = chunk.trajectories

    def same_noise(rows: Tensor, numbers: Tensor, step: int | str, shape: tuple[int, ...]) -> Latents:
        return keyed_noise(shape, [(0, "rollout", 0, 3, number, step) for number in numbers.tolist()], CPU)

    loop = PlainLoop(config, ALONE, iter([prompts]), policy.latent_shape(config.video))
    loop.noise_of = same_noise
    samples = loop.sample(prompts, torch.zeros(4, dtype=torch.long), torch.arange(4), trained(3))
    torch.testing.assert_close(torch.stack(samples.latents, dim=1), trajectory.latents, rtol=0, atol=2e-5)
    assert tuple(samples.log_probs) == trajectory.trained_steps == (0, 1, 2)
    for step, log_prob in samples.log_probs.items():
        torch.testing.assert_close(log_prob, trajectory.log_probs[:, step], rtol=0, atol=1e-5)
    torch.testing.assert_close(loop.decode(samples.latents[-1]), chunk.videos, rtol=0, atol=1e-4)

    advantage = torch.tensor([[1.0, -1.0, 0.5, -0.5]])
    replay = Replay(policy, config, prompts, GroupAdvantages(advantage, None, torch.ones(1), {}), 0, CPU)
    ours, theirs = policy.transformers["transformer"].requires_grad_(), loop.pipeline.transformer
    for step in trajectory.trained_steps:
        ours.zero_grad()
        theirs.zero_grad()
        replay.loss(trajectory, step).value.backward()
        loop.loss(samples, step, advantage[0]).backward()
        for (name, found), parameter in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert (found.grad - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name

    norms = loop.train_step(trained)
    assert len(norms) == config.optim.updates_per_rollout == 2
    assert all(norm > 0 for norm in norms)
