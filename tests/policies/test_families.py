"""Every family: rollouts equal diffusers' pipeline, updates learn, and exports are readable by diffusers."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.reading import to_yaml
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.ulysses import Ulysses
from bpgo_video.inference.conversion import Conversion, convert
from bpgo_video.inference.run_weights import find_checkpoint
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.planning.fake import alone_in_a_group
from bpgo_video.policies import Policy
from bpgo_video.policies.attention import parallelise
from bpgo_video.policies.attention_backends import choose_attention
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import blocks_of, networks_of
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import Denoiser, training_denoiser
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.rollouts.updates import optimise
from tests.families import CASES, Case
from tests.families.case import CPU
from tests.made.zero_checkpoints import write_checkpoint
from tests.rollouts.test_replay import PlainLearner, total_loss

STEPS = 4  # divides the number of training timesteps, as diffusers' DDIM requires


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "pipeline"
    case.write(path)
    return path


@pytest.fixture
def policy(case: Case, folder: Path) -> Policy:
    return case.policy(folder)


@pytest.mark.parametrize("guided", [False, True])
def test_the_ode_rollout_equals_the_pipeline(case: Case, folder: Path, policy: Policy, guided: bool) -> None:
    """This covers schedule, shift, text, image, guidance and latent normalisation, up to the pixels."""
    scale, scale_2 = (case.guidance_scale, case.guidance_scale_2) if guided else (1.0, None)
    config = case.recipe(folder)
    prompts = case.prompts(policy, config)
    noise = torch.randn(2, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(1))
    start = policy.start(noise, prompts.conditioning)
    denoiser = Denoiser(
        policy=policy, sigmas=policy.sigmas(STEPS, case.video), sampler="ode", eta=0.0, guidance_scale=scale,
        guidance_scale_2=scale_2, latents_dtype=torch.float32,
    )  # fmt: skip
    latents = denoiser.denoise(start, guidance_of(prompts, torch.arange(2), CPU), lambda _: start).latents[:, -1]
    found = policy.decode(latents, prompts.conditioning)
    expected = case.diffusers_videos(policy, noise, STEPS, guided)
    assert found.shape[1] == case.video.num_frames
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_folder_of_an_older_diffusers_version_gives_the_same_policy(case: Case, folder: Path, tmp_path: Path) -> None:
    """Published folders lack later settings, for which diffusers uses the defaults of its classes."""
    older = tmp_path / "older"
    copytree(folder, older)
    dropped = 0
    for name, model_class in networks_of(folder).items():
        path = older / name / "config.json"
        config, defaults = json.loads(path.read_text()), inspect.signature(model_class.__init__).parameters
        kept = {key: value for key, value in config.items() if key not in defaults or defaults[key].default != value}
        dropped += len(config) - len(kept)
        path.write_text(json.dumps(kept))
    assert dropped > 5
    policies = [case.policy(path, components=("transformer", "vae")) for path in (folder, older)]
    newer, found = (
        [policy.latent_shape(case.video), policy.call_defaults(), policy.padding_frames, policy.fps, decoded(policy)]
        for policy in policies
    )
    assert found == newer


def test_a_chosen_attention_stays_in_sequence_groups(case: Case, folder: Path) -> None:
    policy = case.policy(folder, components=("transformer",))
    choose_attention(policy.transformers, "_native_math", policy.sequence_plan)
    with alone_in_a_group(2) as mesh:
        for transformer in policy.transformers.values():
            parallelise(transformer, mesh, policy.sequence_plan)
    processors = [getattr(module, "processor", None) for module in policy.transformers.modules()]
    shared = [one for one in processors if isinstance(getattr(one, "_parallel_config", None), Ulysses)]
    assert {one._attention_backend for one in shared} == {AttentionBackendName._NATIVE_MATH}


def decoded(policy: Policy) -> list[float]:
    latents, conditioning = policy.example()
    with torch.no_grad():
        velocity = policy.velocity(latents, torch.tensor(0.7), conditioning)
    return policy.decode(latents - 0.7 * velocity, conditioning).flatten().tolist()


def test_the_ratio_is_one_and_an_update_lowers_its_own_loss(case: Case, folder: Path, policy: Policy) -> None:
    config = case.recipe(folder)
    config = replace(config, loss=replace(config.loss, clip_range=(0.9, 9.0)))
    prompts = case.prompts(policy, config)
    chunks = sample_chunks(
        training_denoiser(policy, config), prompts, Mesh(0, 1, CPU), group_size=4, micro_batch_size=4,
        latent_shape=policy.latent_shape(case.video), key=(0, "rollout", 0),
        trained_steps=trained_steps_of(policy, config, 0),
    )  # fmt: skip
    advantage = torch.tensor([[1.0, -1.0, 0.5, -0.5], [0.2, -0.2, 1.5, -1.5]])
    advantages = GroupAdvantages(advantage, advantage.flip(1), torch.tensor([1.2, 0.8]), {})
    trajectories = [trajectory for chunk in chunks for trajectory in chunk.trajectories]
    objective = Replay(policy, config, prompts, advantages, 0, CPU)
    before = total_loss(objective, trajectories)
    learner = PlainLearner(policy.transformers, learning_rate=1e-3)
    found = optimise(learner, objective, trajectories, updates_per_rollout=1)
    assert found.metrics["ratio_error_first_update_max"] == 0.0
    assert total_loss(objective, trajectories) < before


def test_samples_at_different_noise_levels_equal_separate_forwards(case: Case, folder: Path, policy: Policy) -> None:
    sigma = torch.tensor([0.97, 0.93])
    conditioning = case.prompts(policy, case.recipe(folder)).conditioning
    latents = torch.randn(2, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(1))
    together = policy.velocity(latents, sigma, conditioning)
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in conditioning.items()}
        alone = policy.velocity(latents[row : row + 1], sigma[row], own)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, policy.velocity(latents, sigma[0], conditioning), atol=1e-5)


def test_decoding_inverts_the_normalisation_of_encoding(
    case: Case, folder: Path, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not case.encodes_clips:
        pytest.skip("cannot be trained on clips")
    video = case.video
    shape = (2, video.num_frames, 3, video.height, video.width)
    videos = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    latents = policy.encode_video(videos)
    assert latents.shape == (2, *policy.latent_shape(video))
    assert latents.dtype == torch.float32
    given: list[torch.Tensor] = []
    policy.options = type(policy).options  # without noise for the VAE to remove
    vae, decode = policy.pipeline.vae, policy.pipeline.vae.decode
    monkeypatch.setattr(
        vae, "decode", lambda value, *rest, **named: given.append(value) or decode(value, *rest, **named)
    )
    policy.decode(latents, case.prompts(policy, case.recipe(folder)).conditioning)
    whole = torch.cat([videos[:, :1].repeat(1, case.hidden_frames, 1, 1, 1), videos], dim=1)
    pixels = (2 * whole - 1).transpose(1, 2)
    if len(policy.decoded_shape(policy.latent_shape(video))) == 3:  # a VAE without an axis of frames
        own: Any = ...
        pixels = pixels[:, :, 0]
    else:
        own = (slice(None), slice(None), slice(max(policy.given_frames, case.adjusted_frames), None))
    expected = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(torch.cat(given)[own], expected[own], rtol=1e-5, atol=1e-5)


def test_transformer_blocks_are_found_and_checkpointed(policy: Policy) -> None:
    assert blocks_of(policy.transformers, policy.block_names)
    for module in policy.transformers.values():
        module.enable_gradient_checkpointing()
        assert module.is_gradient_checkpointing


@pytest.mark.parametrize("rank", [0, 4])
def test_exports_are_readable_by_diffusers(case: Case, folder: Path, policy: Policy, rank: int, tmp_path: Path) -> None:
    """All weights as a pipeline folder, adapters as a LoRA file: both are reloaded, compared, and run one forward."""
    lora = LoraConfig(rank=rank, alpha=8, target_modules=case.lora)
    generator = torch.Generator().manual_seed(1)
    for module in policy.transformers.values():
        if rank:
            add_lora(module, lora, seed=0)
    trained = {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in policy.transformers.named_parameters()
        if parameter.requires_grad
    }
    config = case.recipe(folder)
    config = replace(config, policy=replace(config.policy, lora=lora))
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002", [trained])
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    job = Conversion(find_checkpoint(checkpoint), "raw", tmp_path / "out")
    convert(job, "lora" if rank else "diffusers", verify=True)
