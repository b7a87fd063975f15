"""Qwen-Image: padding of texts, the norm of guided velocities in rollout and replay, and refused folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.policies import Policy, guided_velocity
from bpgo_video.policies.base import both_velocities
from bpgo_video.policies.image import packed
from bpgo_video.rollouts.denoiser import Denoiser
from bpgo_video.types import Guidance, Latents
from tests.families import CASES
from tests.families.case import NEGATIVE, TEXTS

SIGMA, SCALE = torch.tensor(0.8), 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("qwen") / "pipeline"
    CASES["qwen_image"].write(path)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return CASES["qwen_image"].policy(folder, components=("transformer", "text_encoder"))


@pytest.fixture(scope="module")
def guidance(policy: Policy) -> Guidance:
    negative = {name: value.expand(2, *value.shape[1:]) for name, value in policy.encode([NEGATIVE]).items()}
    return Guidance(policy.encode(TEXTS), negative)


@pytest.fixture(scope="module")
def latents(policy: Policy) -> Latents:
    shape = policy.latent_shape(CASES["qwen_image"].video)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_padding_changes_nothing(folder: Path, policy: Policy, latents: Latents) -> None:
    whole = policy.encode(TEXTS)
    longest = int(whole["prompt_embeds_mask"].sum(dim=1).max())
    assert longest < policy.max_sequence_length
    cut = {name: value[:, :longest] for name, value in whole.items()}
    torch.testing.assert_close(
        policy.velocity(latents, SIGMA, whole), policy.velocity(latents, SIGMA, cut), rtol=0, atol=2e-6
    )
    whole["prompt_embeds"][:, longest:] = 7.0
    torch.testing.assert_close(
        policy.velocity(latents, SIGMA, whole), policy.velocity(latents, SIGMA, cut), rtol=0, atol=2e-6
    )


@torch.no_grad()
def test_a_guided_token_has_the_direction_of_guidance_and_the_norm_of_the_prompt(
    policy: Policy, guidance: Guidance, latents: Latents
) -> None:
    prompted, unprompted = (packed(x) for x in both_velocities(policy, latents, SIGMA, guidance))
    plain = unprompted + SCALE * (prompted - unprompted)
    found = packed(guided_velocity(policy, latents, SIGMA, guidance, SCALE))
    torch.testing.assert_close(found.norm(dim=-1), prompted.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(found, plain, dim=-1), torch.ones(2, 6))
    assert (plain.norm(dim=-1) / prompted.norm(dim=-1) - 1).abs().max() > 0.01, "guidance changes norms otherwise"


@torch.no_grad()
def test_ode_steps_that_reuse_guidance_have_the_same_norm(policy: Policy, guidance: Guidance, latents: Latents) -> None:
    denoiser = Denoiser(
        policy=policy, sigmas=torch.tensor([0.9, 0.8, 0.0]), sampler="ode", eta=0.0, guidance_scale=SCALE,
        latents_dtype=torch.float32, guidance_every=2,
    )  # fmt: skip
    path = denoiser.begin(latents)
    first, guided = denoiser.ode_velocity(path, guidance)
    torch.testing.assert_close(first, denoiser.velocity(latents, 0, guidance))
    reused, _ = denoiser.ode_velocity(path._replace(step=1, guided=guided), guidance)
    prompted = policy.velocity(latents, SIGMA, guidance.towards)
    torch.testing.assert_close(packed(reused).norm(dim=-1), packed(prompted).norm(dim=-1))


@pytest.mark.parametrize("setting", ["zero_cond_t", "use_layer3d_rope"])
def test_transformers_of_other_tasks_are_refused(setting: str, tmp_path: Path) -> None:
    CASES["qwen_image"].write(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: True}))
    with pytest.raises(ConfigError, match=rf"sets {setting} to True; QwenImagePipeline samples only \[False\]"):
        CASES["qwen_image"].policy(tmp_path, components=())
