"""Wan VACE: what the second stack of blocks gets, files of prompts, generation, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanVACEPipeline
from PIL import Image

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.generation import GenerationError
from bpgo_video.data.clips import read_clip
from bpgo_video.data.containers import VideoError
from bpgo_video.data.media import as_bytes
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import ShardError, encoder_stamp, prompt_id
from bpgo_video.data.stream import PromptStream
from bpgo_video.data.writer import build_shards
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import conditioned
from bpgo_video.training.inputs import check_prompts
from tests.families import CASES
from tests.families.case import CPU
from tests.inference.videos import case_settings, jobs_of, videos

KINDS = ("vace", "vace_image", "vace_both")
CASE = CASES["vace"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "pipeline"
    CASE.write(path)
    return path


def by_pipeline(folder: Path, row: int, kind: str) -> torch.Tensor:
    """The control latents of diffusers' pipeline, from its own methods."""
    case = CASES[kind]
    pipeline = WanVACEPipeline.from_pretrained(folder)
    frames = [Image.fromarray(frame) for frame in as_bytes(read_clip(case.control_files()[row], 0.0, case.video))]
    video, mask, images = pipeline.preprocess_conditions(
        None if kind == "vace_image" else frames, None, None if kind == "vace" else case.pictures()[row],
        height=64, width=64, num_frames=9, dtype=torch.float32, device=CPU,
    )  # fmt: skip
    latents = pipeline.prepare_video_latents(video, mask, images)
    return torch.cat([latents, pipeline.prepare_masks(mask, images)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_control_latents_equal_the_pipelines(folder: Path, kind: str) -> None:
    policy = CASES[kind].policy(folder)
    found = CASES[kind].prompts(policy, CASES[kind].recipe(folder)).conditioning["control_latents"]
    assert found.shape[1:] == policy.conditioning_shapes(policy.latent_shape(CASE.video), 1)["control_latents"]
    with torch.no_grad():
        expected = torch.cat([by_pipeline(folder, row, kind) for row in range(2)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_the_pipeline(folder: Path, tmp_path: Path, kind: str) -> None:
    """It makes one video a call, since the pipeline takes one prompt."""
    case = CASES[kind]
    settings = case_settings(case, folder, tmp_path, num_steps=3)
    found, policy = videos(settings), case.policy(folder, components=())
    pipeline = WanVACEPipeline.from_pretrained(folder)
    for row, text in enumerate(case.texts):
        frames = read_clip(case.control_files()[row], 0.0, case.video)
        media: dict[str, Any] = {} if kind == "vace_image" else {"video": [*map(Image.fromarray, as_bytes(frames))]}
        media |= {} if kind == "vace" else {"reference_images": case.pictures()[row]}
        noise = keyed_noise(policy.latent_shape(case.video), [(5, "generation", prompt_id(text), 0)], "cpu")
        expected = pipeline(
            text, negative_prompt="", height=64, width=64, num_frames=9, num_inference_steps=3, guidance_scale=2.0,
            max_sequence_length=case.text_tokens, latents=noise, output_type="pt", **media,
        ).frames  # fmt: skip
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-5)


def write_shards(root: Path, policy: Policy, files: Callable[[int], dict[str, str]]) -> PromptShards:
    """Shards of two prompts with these files; the case's videos and pictures are 0.mp4, 0.png and so on."""
    for row, data in enumerate(CASE.control_files()):
        (root / f"{row}.mp4").write_bytes(data)
        CASE.pictures()[row].save(root / f"{row}.png")
    lines = [json.dumps({"prompt": text, **files(row)}) for row, text in enumerate(CASE.texts)]
    (root / "prompts.jsonl").write_text("\n".join(lines))
    stamp = encoder_stamp(policy.folder, CASE.text_tokens)
    build_shards([root / "prompts.jsonl"], root / "shards", policy.encode, stamp)
    return PromptShards(root / "shards")


def test_videos_of_shards_become_conditioning_on_the_rank_of_their_samples(folder: Path, tmp_path: Path) -> None:
    policy = CASE.policy(folder)
    shards = write_shards(tmp_path, policy, lambda row: {"video": f"{row}.mp4"})
    recipe = CASE.recipe(folder)
    recipe = replace(recipe, rollout=replace(recipe.rollout, micro_batch_size=4))
    batch = next(PromptStream(shards, "train", 0, 2))
    expected = CASE.prompts(policy, recipe)
    order = [expected.texts.index(text) for text in batch.texts]
    whole = expected.conditioning["control_latents"][order]
    for rank in (0, 1):
        own = conditioned(batch, policy, recipe, torch.float32, Mesh(rank, 2, CPU), 4).conditioning["control_latents"]
        torch.testing.assert_close(own[rank], whole[rank], rtol=0, atol=1e-6)
        assert not own[1 - rank].any()
    texts_only = CASES["wan"]
    texts_only.write(tmp_path / "wan")
    plain = conditioned(batch, texts_only.policy(tmp_path / "wan"), recipe, torch.float32, Mesh(0, 1, CPU), 4)
    assert plain.videos is None, "a policy of texts does not read them"


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (
            lambda row: {},
            ConfigError,
            "makes videos that follow a video, but the prompts of split 'train' .* have none",
        ),
        (
            lambda row: {"video": "0.mp4"} if row else {},
            ShardError,
            "1 prompts of the split 'train' .* have a video, 1 ",
        ),
    ],
)
def test_prompts_without_videos_are_refused(
    folder: Path, tmp_path: Path, files: Any, error: type[Exception], message: str
) -> None:
    shards = write_shards(tmp_path, CASE.policy(folder), files)
    recipe = CASE.recipe(folder)
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, rewards={}))
    with pytest.raises(error, match=message):
        check_prompts(recipe, shards)


def test_a_video_that_is_too_short_is_named_with_its_prompt(folder: Path) -> None:
    longer = replace(CASE, video=replace(CASE.video, num_frames=13))
    policy = longer.policy(folder)
    prompts = replace(longer.prompts(policy, longer.recipe(folder)), videos=CASE.control_files())
    with pytest.raises(VideoError, match=r"the video of prompt 'a red circle.*' ends before 1\.\d+ s, .* 13 frames"):
        conditioned(prompts, policy, longer.recipe(folder), torch.float32, Mesh(0, 1, CPU), 4)


def test_generation_without_a_video_names_the_prompt(folder: Path, tmp_path: Path) -> None:
    settings = case_settings(CASE, folder, tmp_path)
    settings.prompts.write_text('{"prompt": "a shape"}\n')
    with pytest.raises(GenerationError, match="needs the video of each prompt, but 'a shape' has none; add 'video'"):
        jobs_of(settings)


def test_clips_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="ControlVideoPolicy cannot be trained on clips, which name no control"):
        CASE.policy(folder).encode_video(torch.zeros(1, 9, 3, 64, 64))
