"""Reference videos in prompt shards: stored byte for byte, checked when they are added and by `verify`."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import torch

from bpgo_video.data.fingerprint import EncoderStamp
from bpgo_video.data.media import VideoError, write_video
from bpgo_video.data.prompt_files import PromptFileError
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.writer import build_shards


def build(folder: Path, video: str) -> PromptShards:
    (folder / "p.jsonl").write_text(json.dumps({"prompt": "like this", "video": video}) + "\n")

    def encode(texts):
        return {"prompt_embeds": torch.ones(len(texts), 1, 1)}

    build_shards([folder / "p.jsonl"], folder / "out", encode, EncoderStamp("stub", "0", 1))
    return PromptShards(folder / "out")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_video(tmp_path / "v.mp4", torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 8)
    return tmp_path / "v.mp4"


def test_a_video_is_restored_byte_for_byte(clip: Path) -> None:
    shards = build(clip.parent, clip.name)
    assert shards.record(0).media["video"] == ("mp4", clip.read_bytes())
    assert not shards.has_images("train")
    shards.verify()


def test_an_undecodable_video_is_reported_with_its_line(clip: Path) -> None:
    clip.write_bytes(clip.read_bytes()[:-500])
    with pytest.raises(PromptFileError, match=r"p.jsonl:1: .*v.mp4 .*is it complete"):
        build(clip.parent, clip.name)


def test_a_file_of_another_type_is_named(clip: Path) -> None:
    with pytest.raises(PromptFileError, match=r"v.avi: reference videos are mp4, mkv, mov, webm files"):
        build(clip.parent, clip.rename(clip.with_suffix(".avi")).name)


def test_verify_decodes_videos_whose_hash_matches(clip: Path) -> None:
    """Another program could write such a folder: every hash matches, but the video does not decode."""
    build(clip.parent, clip.name)
    shard, data = clip.parent / "out" / "prompts-000000.tar", clip.read_bytes()
    with tarfile.open(shard) as tar:
        place = tar.getmember("000000000.video.mp4").offset_data
    broken = data[:64] + bytes(len(data) - 64)
    content = shard.read_bytes().replace(
        hashlib.sha256(data).hexdigest().encode(), hashlib.sha256(broken).hexdigest().encode()
    )
    shard.write_bytes(content[:place] + broken + content[place + len(data) :])
    with pytest.raises(VideoError, match=r"prompts-000000.tar: prompt 'like this'.*is it complete"):
        PromptShards(clip.parent / "out").verify()
