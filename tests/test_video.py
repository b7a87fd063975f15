"""Video files: H.264 at the true rate, and two readers that agree bit for bit."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from bpgo_video.data.video import VideoError, read_decord, read_pyav, read_video, write_video
from bpgo_video.tiny import world


def clip(frames: int = 9) -> torch.Tensor:
    caption = world.Caption("triangle", "green", "right")
    return world.render(world.sample_scenes([caption], torch.Generator().manual_seed(0), frames))[0]


def textured(frames: int, height: int, width: int) -> torch.Tensor:
    noise = torch.rand(frames, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")


@pytest.mark.parametrize(("video", "bar"), [(clip(), 36.0), (textured(5, 48, 80), 30.0)], ids=["shape", "texture"])
def test_a_written_video_comes_back_close(tmp_path: Path, video: torch.Tensor, bar: float) -> None:
    write_video(tmp_path / "v.mp4", video, 8)
    read, fps = read_video(tmp_path / "v.mp4")
    assert read.shape == video.shape
    assert fps == 8
    assert -10 * (read - video).square().mean().log10() > bar


@pytest.mark.parametrize("fps", [8, 16, 23.976, 24000 / 1001, 30000 / 1001])
def test_frames_last_exactly_one_over_fps(tmp_path: Path, fps: float) -> None:
    write_video(tmp_path / "v.mp4", clip(33), fps)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [Fraction(i) / Fraction(fps).limit_denominator(1001) for i in range(33)]
    assert read_decord(tmp_path / "v.mp4")[1] == pytest.approx(fps, rel=1e-6)
    assert read_pyav(tmp_path / "v.mp4")[1] == pytest.approx(fps, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 32, 32), (33, 64, 64), (12, 240, 416), (4, 38, 50)])
def test_both_readers_give_the_same_bits(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    write_video(tmp_path / "v.mp4", textured(*shape), 24)
    one, two = read_decord(tmp_path / "v.mp4")[0], read_pyav(tmp_path / "v.mp4")[0]
    assert np.array_equal(one, two)
    assert len(one) == shape[0]


def test_pyav_reads_what_decord_cannot(tmp_path: Path) -> None:
    """decord 0.6.0 fails on videos less than 32 pixels wide."""
    write_video(tmp_path / "v.mp4", textured(2, 16, 16), 24)
    with pytest.raises(Exception, match="size must exactly match"):
        read_decord(tmp_path / "v.mp4")
    assert read_video(tmp_path / "v.mp4")[0].shape == (2, 3, 16, 16)


def test_pyav_reads_where_decord_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", clip(), 8)
    with_decord, fps = read_video(tmp_path / "v.mp4")
    monkeypatch.setitem(sys.modules, "decord", None)
    without, same_fps = read_video(tmp_path / "v.mp4")
    assert torch.equal(with_decord, without)
    assert fps == same_fps


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", clip(), 8)
    (tmp_path / "half.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:1500])
    (tmp_path / "text.mp4").write_text("hello")
    for name, message in (("half.mp4", "complete"), ("text.mp4", "complete"), ("none.mp4", "does not exist")):
        with pytest.raises(VideoError, match=rf"{name}.*{message}"):
            read_video(tmp_path / name)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (clip() * 2, r"0.2 to 1.\d+; they must be in \[0, 1\]"),
        (clip() * float("nan"), "nan"),
        (clip()[..., :-1], "even sizes"),
        (clip()[:, :1], "frames,? 3"),
        (clip()[:0], r"\(frames, 3"),
    ],
    ids=["range", "nan", "odd", "grey", "empty"],
)
def test_what_is_no_video_is_not_written(tmp_path: Path, video: torch.Tensor, message: str) -> None:
    with pytest.raises(Exception, match=message):
        write_video(tmp_path / "v.mp4", video, 8)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", clip(), 8)
    before = (tmp_path / "v.mp4").read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", interrupt, raising=True)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "v.mp4", clip(12), 8)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
