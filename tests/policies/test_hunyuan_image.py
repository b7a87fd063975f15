"""HunyuanVideo image-to-video: initial latents, conditioning of the transformer, and counting of frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.inference.pipeline import resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies import Policy, load_policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.rollout import sample_chunks
from tests.families import CASES, Case
from tests.families.case import CPU, TEXTS

KINDS = {"concat": CASES["hunyuan_image_concat"], "first_frame": CASES["hunyuan_image"]}
BLACK = 24 * 24 // 2  # states of a black image accompany a negative prompt


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) / "pipeline" for kind in KINDS}
    for kind, folder in found.items():
        KINDS[kind].write(folder)
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def case(kind: str) -> Case:
    return KINDS[kind]


@pytest.fixture
def policy(kind: str, folders: dict[str, Path]) -> Policy:
    return KINDS[kind].policy(folders[kind])


def inputs_of_the_transformer(policy: Any, latents: Tensor, conditioning: Any) -> Tensor:
    seen: dict[str, Tensor] = {}
    policy.transformers["transformer"].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    policy.velocity(latents, torch.tensor(0.7), conditioning)
    return seen["hidden_states"]


def test_the_initial_latents_contain_a_thousandth_of_the_image(
    kind: str, case: Case, policy: Policy, folders: dict[str, Path]
) -> None:
    config = case.recipe(folders[kind])
    prompts = case.prompts(policy, config)
    chunks = sample_chunks(
        training_denoiser(policy, config), prompts, Mesh(0, 1, CPU), group_size=2, micro_batch_size=4,
        latent_shape=policy.latent_shape(case.video), key=(0, "rollout", 0), same_start=True,
    )  # fmt: skip
    (trajectory,) = next(iter(chunks)).trajectories
    keys = [(0, "rollout", 0, int(prompts.ids[row]), 0, "start") for row in trajectory.prompt_rows]
    noise = keyed_noise(policy.latent_shape(case.video), keys, CPU).double()
    image = prompts.conditioning["image_latents"][trajectory.prompt_rows].double()
    assert image.abs().max() > 0.1
    found = trajectory.latents[:, 0].double()
    torch.testing.assert_close(found, 0.999 * noise + 0.001 * image, rtol=0, atol=1e-6)


def test_the_image_is_added_as_channels_or_as_the_first_frame(kind: str, policy: Policy) -> None:
    latents, conditioning = policy.example()
    image, zeros = conditioning["image_latents"][:, :, 0], torch.zeros_like(latents[:, :, 0])
    seen = inputs_of_the_transformer(policy, latents, conditioning)
    if kind == "first_frame":
        assert torch.equal(seen, torch.stack([image, *latents.unbind(2)], dim=2))
        return
    assert torch.equal(seen[:, :4], latents)
    assert torch.equal(seen[:, 4:8], torch.stack([image, zeros], dim=2))
    assert torch.equal(seen[:, 8], torch.stack([torch.ones_like(image[:, 0]), zeros[:, 0]], dim=1))


def test_frame_counts_refer_to_displayed_frames(folders: dict[str, Path]) -> None:
    """Nine frames have three latent frames, of which one is given, or a fourth one that is dropped."""
    policies = {kind: case.policy(folders[kind], components=()) for kind, case in KINDS.items()}
    assert policies["first_frame"].latent_shape(KINDS["first_frame"].video) == (4, 2, 4, 6)
    assert policies["concat"].latent_shape(KINDS["concat"].video) == (4, 4, 4, 6)
    with pytest.raises(ConfigError, match=r"num_frames is 1, and the image is the first .* take 5 frames or more"):
        policies["first_frame"].latent_shape(replace(KINDS["first_frame"].video, num_frames=1))


def test_the_default_number_of_frames_is_the_pipelines(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The pipeline's call takes 129, of which latent_concat displays 125."""
    settings = GenerationSettings(policy=str(folders[kind]), prompts=tmp_path, output=tmp_path, seed=0)
    model = find_model(settings)
    call = resolve(settings, model.policy)
    assert (call.num_frames, call.height, call.width) == (125 if kind == "concat" else 129, 720, 1280)
    assert (call.guidance_scale, model.policy.options) == (1.0, {"embedded_guidance": 1.0})


def test_image_states_precede_text_states(kind: str, case: Case, policy: Policy) -> None:
    prompts = case.prompts(policy, case.recipe(policy.folder))
    rows = BLACK + case.text_tokens - 4  # the pipeline truncates four text tokens
    own = BLACK if kind == "concat" else BLACK // 2
    assert prompts.conditioning["prompt_embeds"].shape == (2, rows, 16)
    assert prompts.negative["prompt_embeds"].shape == (1, rows, 16)
    assert prompts.conditioning["prompt_attention_mask"].sum(1).tolist() == [own + 5, own + 5], "five words each"
    assert prompts.negative["prompt_attention_mask"].sum(1).tolist() == [BLACK + 3]


def test_text_encoding_does_not_depend_on_the_batch_and_long_texts_are_truncated(case: Case, policy: Policy) -> None:
    """The pipeline truncates a long text that is encoded alone."""
    texts = [TEXTS[0], " ".join(TEXTS * 3)]
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    together = policy.encode_with_images(texts, images)
    for row, text in enumerate(texts):
        for name, value in policy.encode_with_images([text], images[row : row + 1]).items():
            assert torch.equal(together[name][row], value[0])
    assert together["prompt_attention_mask"][1].sum() == together["prompt_attention_mask"][0].sum() + 3, (
        "all 8 positions"
    )


def test_masked_tokens_change_nothing(policy: Policy) -> None:
    """Rows are padded so that all prompts have the same number."""
    latents, conditioning = policy.example()
    sigma = torch.tensor(0.7)
    longer = {
        **conditioning,
        "prompt_embeds": torch.cat([conditioning["prompt_embeds"], torch.zeros(1, 3, 16)], dim=1),
        "prompt_attention_mask": torch.cat(
            [conditioning["prompt_attention_mask"], torch.zeros(1, 3, dtype=torch.bool)], dim=1
        ),
    }
    expected = policy.velocity(latents, sigma, conditioning)
    torch.testing.assert_close(policy.velocity(latents, sigma, longer), expected, rtol=1e-5, atol=1e-6)


def test_the_pipeline_must_match_the_transformer(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"image_condition_type to 'latent_concat'; HunyuanVideoPipeline samples only"
    ):
        load_policy(str(folders["concat"]), max_sequence_length=12, components=(), name="HunyuanVideoPipeline")
    CASES["hunyuan"].write(tmp_path / "texts")
    with pytest.raises(
        ConfigError, match=r"image_condition_type to None; .* samples only \['latent_concat', 'token_rep"
    ):
        load_policy(
            str(tmp_path / "texts"), max_sequence_length=12, components=(), name="HunyuanVideoImageToVideoPipeline"
        )
