"""Prompts whose text encoder also reads the image: shards hold the policy's embeddings, keyed by image and size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bpgo_video.commands import prompts as tool
from bpgo_video.commands import videos
from bpgo_video.data.clips import read_clip
from bpgo_video.data.media import decode_image, fit_image, write_video
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import LATENTS, ShardError
from bpgo_video.data.stream import as_batch
from bpgo_video.data.writer import image_stamp
from bpgo_video.policies import Policy
from bpgo_video.tiny import world as world
from bpgo_video.training.inputs import read_common_inputs
from tests.families import CASES
from tests.families.hunyuan import HUNYUAN_FIRST_FRAME
from tests.made.random_wan import random_wan
from tests.made.recipes import RECIPE

CASE = HUNYUAN_FIRST_FRAME
ROOT = RECIPE.parents[2]
TEXT = "a red circle moving left"
LINES = [  # text, picture, the prompt's negative prompt
    (TEXT, 0, None),
    (TEXT, 1, "a green triangle"),
    ("a blue square moving up", 0, None),
    (TEXT, 2, "a green triangle"),
]
SIZE = ["--height", "32", "--width", "48"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "pipeline"
    CASE.write(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures 0 and 1 have a wider aspect ratio than the video; picture 2 has the pixels of 0 in different bytes."""
    path, generator = tmp_path_factory.mktemp("prompts"), np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(generator.integers(0, 255, (40, 90, 3), dtype=np.uint8)).save(path / f"{number}.png")
    Image.open(path / "0.png").save(path / "2.png", compress_level=1)
    lines = [
        {"prompt": text, "id": row, "image": f"{picture}.png"} | ({"negative_prompt": negative} if negative else {})
        for row, (text, picture, negative) in enumerate(LINES)
    ]
    (path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path / "p.jsonl"


def arguments(prompts: Path, folder: Path, output: Path) -> list[str]:
    flags = ["--policy", str(folder), "--max-sequence-length", str(CASE.text_tokens)]
    return ["build", "--input", str(prompts), "--output", str(output), *flags]


@pytest.fixture(scope="module")
def built(prompts: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "out"
    assert tool.main([*arguments(prompts, folder, output), *SIZE]) == 0
    return output


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return CASE.policy(folder, components=("text_encoder",))


def test_each_text_is_encoded_with_its_image_cropped_as_in_training(built: Path, policy: Policy) -> None:
    records = list(PromptShards(built).records())
    for record in records:
        image = fit_image(decode_image(record.media["image"].data, "it"), 32, 48)
        for name, value in policy.encode_with_images([record.prompt], image[None]).items():
            assert torch.equal(record.conditioning[name], value[0])
    first, other, _, again = (record.conditioning["prompt_embeds"] for record in records)
    assert not torch.equal(first, other), "equal texts with different images are different prompts"
    assert torch.equal(first, again)
    PromptShards(built).verify()


def test_negative_prompts_are_encoded_with_a_black_image_and_can_share_a_batch(built: Path, policy: Policy) -> None:
    batch = as_batch(list(PromptShards(built).records()))
    black = policy.pipeline.encode_prompt(
        image=Image.new("RGB", (48, 32)), prompt=["a green triangle"], max_sequence_length=CASE.text_tokens
    )[0]
    assert batch.negative_rows.tolist() == [0, 1, 0, 1]
    assert torch.equal(batch.negative["prompt_embeds"][1], black[0])
    for name, value in batch.conditioning.items():
        assert batch.negative[name].shape[1:] == value.shape[1:]
        assert batch.negative[name].dtype == value.dtype


def test_shards_of_another_size_are_not_continued_and_not_used_by_the_recipe(
    built: Path, prompts: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*arguments(prompts, folder, built), "--height", "48", "--width", "48"]) == 2
    assert "images {'height': 32, 'width': 48" in capsys.readouterr().err
    recipe = CASE.recipe(folder)
    recipe = replace(
        recipe, data=replace(recipe.data, shards=str(built)), deepspeed=str(ROOT / "ds_configs/zero1.json")
    )
    assert len(read_common_inputs(recipe)[1]) == len(LINES)
    with pytest.raises(ShardError, match=r"with other images \(height 32, here 48\): set the recipe's `video`"):
        read_common_inputs(replace(recipe, video=replace(recipe.video, height=48)))


def test_another_image_processor_is_another_encoder(built: Path, folder: Path) -> None:
    shards = PromptShards(built)
    shards.check_stamp(image_stamp(folder, (32, 48)))
    (folder / "image_processor" / "note").write_text("another")
    with pytest.raises(ShardError, match="processor"):
        shards.check_stamp(image_stamp(folder, (32, 48)))
    (folder / "image_processor" / "note").unlink()


def test_a_prompt_without_an_image_is_named_before_encoding_starts(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = prompts.parent / "q.jsonl"
    longer.write_text(prompts.read_text() + '{"prompt": "without"}\n')
    assert tool.main([*arguments(longer, folder, tmp_path / "out"), *SIZE]) == 2
    assert "q.jsonl:5: the prompt has no image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_size_is_required_only_where_it_matters(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(arguments(prompts, folder, tmp_path / "out")) == 2
    assert "give --height and --width" in capsys.readouterr().err
    wan = random_wan(tmp_path / "wan")
    assert tool.main([*arguments(prompts, wan, tmp_path / "out"), *SIZE]) == 2
    assert "this policy encodes texts alone: leave them out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hunyuan_image", "hunyuan_image_concat"])
def test_a_caption_is_encoded_with_the_first_frame_of_its_clip(name: str, tmp_path: Path) -> None:
    case, folder = CASES[name], tmp_path / "pipeline"
    case.write(folder)
    video = case.video
    caption = next(caption for caption in world.captions("train") if caption.is_clear)
    clip = world.render(world.sample_scenes([caption], torch.Generator().manual_seed(0)))[0]
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "0.mp4", clip, video.fps, crf=1)
    (tmp_path / "videos" / "0.txt").write_text(caption.text)
    flags = [*arguments(tmp_path / "videos", folder, tmp_path / "out"), *SIZE]
    assert videos.main([*flags, "--num-frames", str(video.num_frames), "--fps", str(video.fps)]) == 0
    shards = PromptShards(tmp_path / "out")
    shards.check_stamp(image_stamp(folder, (video.height, video.width)))
    record, policy = shards.record(0), case.policy(folder)
    frames = read_clip(tmp_path / "videos" / "0.mp4", 0.0, video)
    for part, value in policy.encode_with_images([caption.text], frames[:1]).items():
        assert torch.equal(record.conditioning[part], value[0])
    assert torch.equal(record.clip[LATENTS], policy.encode_video(frames[None])[0])
    assert torch.equal(record.clip["image_latents"], policy.image_conditioning(frames[:1], video)["image_latents"][0])
