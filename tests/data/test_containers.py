"""Hostile video and image files: nothing else is opened, and what is too large is named before it is decoded."""

from __future__ import annotations

import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data import containers, media
from bpgo_video.data.clips import read_clip
from bpgo_video.data.containers import VideoError
from bpgo_video.data.media import ImageError, check_video, decode_image, read_header, read_pixels, write_video

VIDEO = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 32, 48)
READERS = (read_pixels, read_header, lambda path: read_clip(path, 0.0, VideoConfig(9, 32, 48, 8.0)))


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A socket on which nothing may arrive."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def hostile_files(folder: Path, port: int) -> dict[str, bytes]:
    url = f"http://127.0.0.1:{port}/v.mp4".encode()
    write_video(folder / "inner.mp4", VIDEO, 8)
    return {
        "session description": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n" + url + b"\n#EXT-X-ENDLIST\n",
        "local playlist": b"#EXTM3U\n#EXTINF:5,\n" + bytes(folder / "inner.mp4") + b"\n#EXT-X-ENDLIST\n",
        "list": b"ffconcat version 1.0\nfile '" + bytes(folder / "inner.mp4") + b"'\n",
        "manifest": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>'
        + url
        + b"</BaseURL></MPD>",
        "text in an mp4": b"\0\0\0\x18ftypisom" + url,
        "text in an mkv": b"\x1aE\xdf\xa3" + url,
        "text in an avi": b"RIFF\0\0\0\0AVI " + url,
        "empty": b"",
    }


def test_a_file_opens_no_other_file_and_no_address(tmp_path: Path, listening: socket.socket) -> None:
    started = time.monotonic()
    for name, content in hostile_files(tmp_path, listening.getsockname()[1]).items():
        path = tmp_path / "v.mp4"
        path.write_bytes(content)
        for read in READERS:
            with pytest.raises(VideoError, match=r"v\.mp4"):
                read(path)
        with pytest.raises(VideoError, match=name):
            check_video(content, name)
    with pytest.raises(BlockingIOError):
        listening.accept()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["http://127.0.0.1:{}/v.mp4", "tcp:127.0.0.1:{}", "concat:inner.mp4|inner.mp4", "."])
def test_a_path_is_a_file_of_this_machine(name: str, listening: socket.socket) -> None:
    for read in READERS:
        with pytest.raises(VideoError, match="does not exist, or is not a file"):
            read(Path(name.format(listening.getsockname()[1])))


def test_odd_names_are_files(tmp_path: Path) -> None:
    for name in ("a:b.mp4", "100%d.mp4", "é #?.mp4", "data:x.mp4"):
        write_video(tmp_path / name, VIDEO, 8)
        assert read_header(tmp_path / name).frames == 9


@pytest.mark.parametrize("format", ["mp4", "mov", "matroska", "webm", "avi"])
def test_every_container_is_known_by_its_first_bytes(tmp_path: Path, format: str) -> None:
    path = tmp_path / "any.name"
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream("libvpx" if format == "webm" else "mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for number in range(3):
            frame = av.VideoFrame(48, 32, "yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(read_pixels(path)[0]) == 3
    assert check_video(path.read_bytes(), "it") == 3


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_PIXELS", 1000, r"v\.mp4 is 48 x 32, 1,536 pixels a frame; at most 1,000 are read: scale"),
        ("MAX_FRAMES", 5, r"v\.mp4 has 6 frames or more of 48 x 32; at most 5 frames: cut it"),
        ("MAX_HELD", 5000, r"v\.mp4 has 4 frames or more of 48 x 32; at most 5,000 pixels are held at once: cut it"),
    ],
)
def test_what_is_too_large_is_named_with_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    write_video(tmp_path / "v.mp4", VIDEO, 8)
    monkeypatch.setattr(containers, limit, value)
    with pytest.raises(VideoError, match=message):
        read_pixels(tmp_path / "v.mp4")
    if limit == "MAX_HELD":
        assert check_video(str(tmp_path / "v.mp4"), "v.mp4") == 9, "it holds one frame"
        return
    with pytest.raises(VideoError, match=message):
        check_video((tmp_path / "v.mp4").read_bytes(), "v.mp4")


def test_a_stream_that_grows_larger_than_its_header_states_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = tmp_path / "small.avi", tmp_path / "large.avi"
    for path, size in ((small, (48, 32)), (large, (480, 320))):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            container.mux(stream.encode(av.VideoFrame(*size, "yuv420p")))
            container.mux(stream.encode())
    content = bytearray(large.read_bytes())
    for place in (content.index(b"avih") + 8 + 32, content.index(b"strf") + 8 + 4):
        assert struct.unpack_from("<2I", content, place) == (480, 320)
        struct.pack_into("<2I", content, place, 48, 32)
    (tmp_path / "v.avi").write_bytes(content)
    monkeypatch.setattr(containers, "MAX_PIXELS", 10_000)
    with pytest.raises(VideoError, match=r"v\.avi"):
        read_pixels(tmp_path / "v.avi")


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG that states this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(9000, 8000), (100_000, 100_000)])
@pytest.mark.filterwarnings("error")
def test_an_image_that_would_expand_beyond_the_limit_is_named(width: int, height: int) -> None:
    assert media.MAX_PIXELS == 8192 * 8192
    with pytest.raises(ImageError, match=r"^it: .*at most 67,108,864 pixels are read; scale the image down"):
        decode_image(png(width, height), "it")
