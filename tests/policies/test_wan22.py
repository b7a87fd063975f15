"""Wan 2.2: one transformer per noise range, and the 5B policy, whose image is a noise-free first frame."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.policies import Policy, load_policy
from tests.families import CASES, Case
from tests.families.wan22 import BOUNDARY


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("experts") / "pipeline"
    CASES["wan22"].write(folder)
    return CASES["wan22"].policy(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "pipeline"
    CASES["wan22_ti2v"].write(folder)
    return folder


def test_the_boundary_belongs_to_the_high_noise_transformer(experts: Policy) -> None:
    below = float(torch.nextafter(torch.tensor(BOUNDARY), torch.tensor(0.0)))
    found = [experts.transformer_at(sigma) for sigma in (1.0, BOUNDARY, below, 0.0)]
    assert found == ["transformer", "transformer", "transformer_2", "transformer_2"]


def test_only_the_active_transformer_gets_gradients(experts: Policy) -> None:
    latents, conditioning = experts.example()
    for sigma, name, other in ((0.9, "transformer", "transformer_2"), (0.8, "transformer_2", "transformer")):
        experts.transformers.zero_grad(set_to_none=True)
        experts.velocity(latents, torch.tensor(sigma), conditioning).square().mean().backward()
        assert all(parameter.grad is not None for parameter in experts.transformers[name].parameters())
        assert all(parameter.grad is None for parameter in experts.transformers[other].parameters())


@pytest.mark.parametrize(("case", "ratio"), [("wan22", None), ("wan", 0.9)])
def test_a_boundary_without_two_transformers_is_named(tmp_path: Path, case: str, ratio: float | None) -> None:
    CASES[case].write(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "boundary_ratio": ratio}))
    with pytest.raises(ConfigError, match=f"boundary_ratio {ratio}; two transformers need a boundary_ratio"):
        CASES[case].policy(tmp_path / "pipeline")


def test_one_folder_generates_from_text_and_from_images(small: Path) -> None:
    texts, images = (CASES[name].policy(small) for name in ("wan22_ti2v", "wan22_ti2v_image"))
    video = CASES["wan22_ti2v"].video
    assert (texts.takes_images, texts.given_frames, texts.latent_shape(video)) == (False, 0, (4, 3, 6, 6))
    assert (images.takes_images, images.given_frames, images.latent_shape(video)) == (True, 1, (4, 2, 6, 6))
    with pytest.raises(ConfigError, match=r"video.num_frames is 1, and the image is the first of them"):
        images.latent_shape(replace(video, num_frames=1))


def given_frame(case: Case, small: Path) -> tuple[Policy, torch.Tensor, dict[str, torch.Tensor]]:
    policy = case.policy(small)
    prompts = case.prompts(policy, case.recipe(small))
    latents = torch.randn(2, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(1))
    return policy, latents, dict(prompts.conditioning)


def test_the_image_is_the_first_latent_frame_at_noise_level_0(small: Path) -> None:
    case = CASES["wan22_ti2v_image"]
    policy, latents, conditioning = given_frame(case, small)
    assert conditioning["image_latents"].shape == (2, 4, 1, 6, 6)
    whole = torch.cat([conditioning["image_latents"], latents], dim=2)
    tokens = torch.tensor([0.0] * 9 + [600.0] * 18).expand(2, -1)  # 3 frames of 3 x 3
    expected = policy.transformers["transformer"](
        hidden_states=whole, timestep=tokens, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False
    )[0]
    found = policy.velocity(latents, torch.tensor(0.6), conditioning)
    torch.testing.assert_close(found, expected[:, :, 1:])


def test_the_first_frame_of_the_video_is_the_image(small: Path) -> None:
    """For the first frame, a causal VAE ignores the later latent frames."""
    policy, latents, conditioning = given_frame(CASES["wan22_ti2v_image"], small)
    first, second = (policy.decode(scale * latents, conditioning) for scale in (1.0, -1.0))
    assert first.shape[1] == 9
    assert (first[:, 0] - second[:, 0]).abs().max() < 1e-5
    assert (first[:, 1:] - second[:, 1:]).abs().max() > 0.01


def test_a_noise_level_per_sample_equals_the_same_level_per_token(small: Path) -> None:
    policy = load_policy(str(small), max_sequence_length=16)
    latents, conditioning = policy.example()
    tokens = latents[0, 0, :, ::2, ::2].numel()
    arguments = {"hidden_states": latents, "encoder_hidden_states": conditioning["prompt_embeds"], "return_dict": False}
    by_token = policy.transformers["transformer"](timestep=torch.full((1, tokens), 600.0), **arguments)[0]
    torch.testing.assert_close(policy.velocity(latents, torch.tensor(0.6), conditioning), by_token)
