"""What differs between training and use: the size of videos, and what decoding in tiles does to rewards."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.planning.deployment import differences
from bpgo_video.policies import Policy, load_policy
from bpgo_video.training import doctor, tiles
from bpgo_video.training.doctor import Examination, tiles_change_little
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk, Trajectory


def test_another_size_than_the_pipelines_and_other_steps_are_named(policy: Policy, recipe: Config) -> None:
    size, steps = differences(recipe, policy)
    assert size.startswith(
        "training videos are 9 frames of 64 x 64, and WanPipeline makes 81 frames of 480 x 832 by default"
    )
    assert steps.startswith("evaluation.num_steps is 8, and WanPipeline takes 50 steps by default")
    video = replace(recipe.video, num_frames=81, height=480, width=832)
    same = replace(recipe, video=video, evaluation=replace(recipe.evaluation, num_steps=50))
    assert not list(differences(same, policy))
    one = replace(same, video=replace(video, num_frames=1))
    assert next(differences(one, policy)).startswith("training videos are 1 frame of 480 x 832")


class Brightness:
    """A suite of the brightness of the left half, and of a reward that compares samples and scores no single ones."""

    rewards = {"left": SimpleNamespace(groupwise=False), "compared": SimpleNamespace(groupwise=True)}

    def on_device(self) -> Any:
        return nullcontext()

    def score(self, chunk: RolloutChunk, prompts: PromptBatch) -> Any:
        return SimpleNamespace(
            videos={"left": chunk.videos[..., : chunk.videos.shape[-1] // 2].mean(dim=(1, 2, 3, 4))[:, None]}
        )


@pytest.fixture
def examination(recipe: Config) -> Examination:
    """Two prompts' videos of 64 x 64 in tiles of 32 x 32."""
    policy = load_policy(recipe.policy.folder, components=("vae",), max_sequence_length=16)
    policy.pipeline.vae.enable_tiling(32, 32, 24, 24)
    latents = torch.randn(4, 1, *policy.latent_shape(recipe.video), generator=torch.Generator().manual_seed(0))
    rows, samples = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    trajectory = Trajectory(rows, samples, (), latents, torch.zeros(4, 0))
    config = replace(recipe, policy=replace(recipe.policy, vae_tiling=True))
    mesh = Mesh(0, 1, torch.device("cpu"))
    session = Mock(spec=Session, config=config, policy=policy, mesh=mesh, suite=Brightness())
    prompts = PromptBatch(torch.tensor([1, 2]), ("a", "b"), {"prompt_embeds": torch.zeros(2, 16, 4)}, {})
    scores = torch.tensor([[0.0, 0.01], [0.0, 0.01]])
    rewards = Rewards({"left": scores}, scores, {}, {})
    return Examination(session, prompts, Mock(spec=Stopwatch), [trajectory], rewards)


def test_the_doctor_measures_what_tiles_do_to_rewards(
    examination: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, (trajectory,) = examination.session, examination.trajectories
    vae = session.policy.pipeline.vae
    found = tiles.tile_differences(session, examination.prompts, trajectory)["left"]
    assert vae.use_tiling
    clean = trajectory.latents[:2, -1]
    tiled = session.policy.decode(clean, {})
    vae.disable_tiling()
    whole = session.policy.decode(clean, {})
    vae.enable_tiling()
    expected = (tiled - whole)[..., :32].mean(dim=(1, 2, 3, 4))
    assert float(expected.abs().max()) > 1e-5, "tiles change these pictures"
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)

    result = tiles_change_little(examination)
    assert result is not None
    spread = 0.01 / 2**0.5
    share = float(found.abs().mean()) / spread
    assert result == (True, result[1])
    assert f"left {float(found.abs().mean()):.2g}, {share:.0%} of its spread within groups" in result[1]

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(doctor, "tile_differences", full)
    assert tiles_change_little(examination) == (
        True, "a whole video does not fit on some rank, so what tiles do to rewards is not known"
    )  # fmt: skip
    session.config = replace(session.config, policy=replace(session.config.policy, vae_tiling=False))
    assert tiles_change_little(examination) is None
