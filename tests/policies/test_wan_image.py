"""Wan image-to-video: the ODE rollout equals diffusers' pipeline, and each rank encodes only its images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from bpgo_video.config.bpgo import Config, ConfigError, PriorConfig, VideoConfig
from bpgo_video.data.reader import PromptShards
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies import Policy, load_policy
from bpgo_video.policies.wan import TEXT_BESIDE_IMAGES
from bpgo_video.rollouts.conditioning import conditioned, guidance_of
from bpgo_video.rollouts.denoiser import Denoiser, training_denoiser
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.rollouts.updates import Learner, optimise
from bpgo_video.training.inputs import check_images
from bpgo_video.types import PromptBatch
from tests.made.random_wan import LATENTS, TEXT_TOKENS, random_wan

CPU = torch.device("cpu")
VIDEO = VideoConfig(9, 64, 64, 8)
TEXTS = ("a red circle moving left", "a blue square moving up")


@pytest.fixture(scope="module", params=[False, True], ids=["latents", "clip"])
def image_policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = random_wan(tmp_path_factory.mktemp("wan"), images=True, image_encoder=request.param)
    tokens = TEXT_BESIDE_IMAGES if request.param else TEXT_TOKENS
    return load_policy(str(folder), max_sequence_length=tokens)


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def prompts_of(policy: Policy, count: int = 2) -> PromptBatch:
    images = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures(count)]).permute(0, 3, 1, 2) / 255
    texts = [TEXTS[i % 2] for i in range(count)]
    return PromptBatch(torch.arange(count), tuple(texts), policy.encode(texts), policy.encode([""]), images=images)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_ode_rollout_equals_diffusers(image_policy: Policy, recipe: Config, guidance_scale: float) -> None:
    ready = conditioned(prompts_of(image_policy), image_policy, recipe, torch.float32, Mesh(0, 1, CPU), 1)
    start = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(1))
    denoiser = Denoiser(
        policy=image_policy, sigmas=image_policy.sigmas(4, recipe.video), sampler="ode", eta=0.0,
        guidance_scale=guidance_scale, latents_dtype=torch.float32,
    )  # fmt: skip
    guidance = guidance_of(ready, torch.arange(2), CPU)
    found = denoiser.denoise(start, guidance, lambda _: start).latents[:, -1]
    pipeline = WanImageToVideoPipeline.from_pretrained(
        image_policy.folder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    pipeline.set_progress_bar_config(disable=True)
    for sample, picture in enumerate(pictures(2)):
        expected = pipeline(
            image=picture, prompt=TEXTS[sample], negative_prompt="", num_frames=9, height=64, width=64,
            num_inference_steps=4, guidance_scale=guidance_scale, latents=start[sample : sample + 1],
            max_sequence_length=image_policy.max_sequence_length, output_type="latent",
        ).frames  # fmt: skip
        torch.testing.assert_close(found[sample : sample + 1], expected, rtol=0, atol=2e-5)


def test_the_image_affects_the_video(image_policy: Policy, recipe: Config) -> None:
    ready = conditioned(prompts_of(image_policy), image_policy, recipe, torch.float32, Mesh(0, 1, CPU), 1)
    latents = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1, -1)
    same_text = {**ready.conditioning, "prompt_embeds": ready.conditioning["prompt_embeds"][:1].expand(2, -1, -1)}
    first, second = image_policy.velocity(latents, torch.tensor(0.5), same_text)
    assert (first - second).abs().mean() > 1e-3


def test_the_example_input_for_comparing_weights_runs(image_policy: Policy) -> None:
    latents, conditioning = image_policy.example()
    found = image_policy.velocity(latents, torch.tensor(0.5), conditioning)
    assert found.shape == latents.shape
    with torch.no_grad():
        image_policy.transformers["transformer"].patch_embedding.weight[:, -1] *= 2
        changed = image_policy.velocity(latents, torch.tensor(0.5), conditioning)
        image_policy.transformers["transformer"].patch_embedding.weight[:, -1] /= 2
    assert (changed - found).abs().max() > 1e-4, "weights of the image's channels affect the output"


def test_image_features_and_text_tokens_are_distinguished(tmp_path: Path) -> None:
    """diffusers' attention treats all but the last 512 tokens as image tokens; other lengths are refused."""
    folder = random_wan(tmp_path, images=True, image_encoder=True)
    policy = load_policy(str(folder), max_sequence_length=TEXT_BESIDE_IMAGES)
    latents, conditioning = policy.example()
    found = policy.velocity(latents, torch.tensor(0.5), conditioning)
    with torch.no_grad():
        policy.transformers["transformer"].blocks[0].attn2.add_v_proj.weight.mul_(50)
    changed = policy.velocity(latents, torch.tensor(0.5), conditioning)
    assert (changed - found).abs().max() > 1e-3, "weights of the image's keys and values affect the output"
    with pytest.raises(ConfigError, match=r"max_sequence_length is 256.*last 512 tokens.*set it to 512"):
        load_policy(str(folder), max_sequence_length=256).encode(TEXTS)


def test_a_rank_encodes_only_the_images_of_its_samples(image_policy: Policy, recipe: Config) -> None:
    config = replace(recipe, rollout=replace(recipe.rollout, micro_batch_size=2))
    prompts = prompts_of(image_policy, 4)
    whole = conditioned(prompts, image_policy, config, torch.float32, Mesh(0, 1, CPU), 4).conditioning["image_latents"]
    for rank in (0, 1):
        own = conditioned(prompts, image_policy, config, torch.float32, Mesh(rank, 2, CPU), 4).conditioning
        torch.testing.assert_close(own["image_latents"][2 * rank : 2 * rank + 2], whole[2 * rank : 2 * rank + 2])
        assert not own["image_latents"][2 - 2 * rank : 4 - 2 * rank].any()


def test_a_training_step_encodes_each_image_once(
    image_policy: Policy, recipe: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of four in micro-batches of two, with guidance, two trained steps and two updates."""
    encoded = {"vae": 0, "image_encoder": 0}
    for name in encoded:
        network = getattr(image_policy.pipeline, name)
        if network is not None:
            call = "encode" if name == "vae" else "forward"
            monkeypatch.setattr(network, call, counting(getattr(network, call), encoded, name))
    config = replace(
        recipe,
        rollout=replace(recipe.rollout, group_size=4, micro_batch_size=2),
        sampler=replace(recipe.sampler, num_steps=3, train_steps="all", share_steps="batch", guidance_scale=3.0),
        loss=replace(recipe.loss, step_weights="none"),
    )
    prompts = conditioned(prompts_of(image_policy), image_policy, config, torch.float32, Mesh(0, 1, CPU), 4)
    chunks = sample_chunks(
        training_denoiser(image_policy, config), prompts, Mesh(0, 1, CPU), group_size=4, micro_batch_size=2,
        latent_shape=LATENTS, key=(0, "rollout", 0), trained_steps=trained_steps_of(image_policy, config, 0),
    )  # fmt: skip
    trajectories = [trajectory for chunk in chunks for trajectory in chunk.trajectories]
    advantages = GroupAdvantages(torch.randn(2, 4), torch.randn(2, 4), torch.ones(2), {})
    learner = Mock(spec=Learner, replaying=nullcontext, step=lambda: 1.0)
    optimise(learner, Replay(image_policy, config, prompts, advantages, 0, CPU), trajectories, updates_per_rollout=2)
    assert learner.backward.call_count == 8, "four micro-batches, two steps each"
    assert encoded == {"vae": 2, "image_encoder": 2 if image_policy.pipeline.image_encoder is not None else 0}


def counting(call: Callable[..., Any], samples: dict[str, int], name: str) -> Callable[..., Any]:
    """The call, which adds its samples to those of the name."""

    def counted(batch: Tensor, *args: Any, **kwargs: Any) -> Any:
        samples[name] += len(batch)
        return call(batch, *args, **kwargs)

    return counted


class Split(PromptShards):
    """Shards of which one split has images."""

    def __init__(self) -> None:
        pass

    def has_images(self, split: str) -> bool:
        return split == "pictures"


@pytest.mark.parametrize(
    ("takes_images", "kind", "split", "message"),
    [
        (False, "first_frame", "pictures", "prior.kind is 'first_frame'.*makes videos of texts"),
        (True, "first_frame", "words", "split 'words'.*have none"),
    ],
)
def test_settings_that_need_images_are_refused_without_them(
    recipe: Config, takes_images: bool, kind: str, split: str, message: str
) -> None:
    config = replace(recipe, prior=PriorConfig(kind=kind))
    with pytest.raises(ConfigError, match=message):
        check_images(config, takes_images, Split(), [split])
    check_images(config, True, Split(), ["pictures"])
