"""Conditioning images and reference videos: decoding to RGB, fitting to the video's size, and storage in shards."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bpgo_video.data.media import ImageError, VideoError, decode_image, fit_image, image_extension, write_video
from bpgo_video.data.prompt_formats import PromptFileError
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import EncoderStamp, ShardError
from bpgo_video.data.stream import PromptStream, as_batch
from bpgo_video.data.writer import build_shards

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 18, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return decode_image(data, "it").permute(1, 2, 0).numpy()


def test_eight_bit_colours_are_divided_by_255() -> None:
    for kind in ("PNG", "WEBP"):
        assert np.array_equal(pixels(encoded(RGB, kind, lossless=True)), RGB.astype(np.float32) / 255)
    grey = RGB[..., 0]
    assert np.array_equal(pixels(encoded(grey)), np.repeat(grey[..., None], 3, 2).astype(np.float32) / 255)


def test_transparency_is_composited_on_black() -> None:
    alpha = RNG.integers(0, 256, RGB.shape[:2], dtype=np.uint8)
    expected = (RGB / 255) * (alpha[..., None] / 255)
    assert pixels(encoded(np.dstack([RGB, alpha]))) == pytest.approx(expected, abs=1e-6)
    keyed = np.where((RGB[0, 0] == RGB).all(-1, keepdims=True), 0, RGB)  # one colour is marked as transparent
    data = encoded(RGB, transparency=tuple(map(int, RGB[0, 0])))
    assert pixels(data) == pytest.approx(keyed / 255, abs=1e-6)


def test_sixteen_bit_grey_keeps_its_precision_and_colour_its_high_byte() -> None:
    grey = RNG.integers(0, 2**16, (5, 7)).astype(np.uint16)
    assert pixels(encoded(grey))[..., 1] == pytest.approx(grey / 65535, abs=1e-7)
    assert pixels(colour_16(0xABCD, 0x12FF, 0xFFFF))[0, 0] * 255 == pytest.approx([0xAB, 0x12, 0xFF])


def colour_16(*rgb: int) -> bytes:
    """A one-pixel PNG with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(">3H", *rgb))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_the_exif_orientation_is_applied(orientation: int, turn) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encoded(RGB, exif=exif)), turn(RGB).astype(np.float32) / 255)


def test_ambiguous_images_are_refused_by_name() -> None:
    refused = {
        "colour mode CMYK": encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
        "2 frames": encoded(Image.fromarray(RGB), save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]),
        "17 x 1": encoded(RGB[:1, :17]),
        "not a PNG, JPEG, WEBP": encoded(RGB, "GIF"),
        "the file is not a": b"hello",
        "does not decode": encoded(RGB)[:-60],
    }
    for message, data in refused.items():
        with pytest.raises(ImageError, match=rf"^it: .*{message}"):
            decode_image(data, "it")


@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 600), st.integers(0, 7))
def test_a_damaged_image_decodes_or_is_named(kind: str, place: int, bit: int) -> None:
    data = bytearray(encoded(RGB, kind))
    data[place % len(data)] ^= 1 << bit
    for damaged in (bytes(data), bytes(data[: place % len(data)])):
        try:
            found = decode_image(damaged, "it")
        except ImageError:
            continue
        assert 0 <= found.min() <= found.max() <= 1


def test_the_extension_follows_from_the_bytes() -> None:
    assert [image_extension(encoded(RGB, kind), "it") for kind in ("PNG", "JPEG", "WEBP")] == ["png", "jpg", "webp"]


def test_an_image_of_the_videos_size_is_unchanged() -> None:
    image = torch.rand(3, 30, 40)
    assert torch.equal(fit_image(image, 30, 40), image)


@given(st.integers(4, 60), st.integers(4, 60), st.integers(4, 40), st.integers(4, 40))
def test_any_image_fills_any_size_and_keeps_its_colour(h: int, w: int, height: int, width: int) -> None:
    colour = torch.tensor([0.0, 0.4, 1.0])
    fitted = fit_image(colour[:, None, None].expand(3, h, w), height, width)
    assert fitted.shape == (3, height, width)
    assert torch.allclose(fitted, colour[:, None, None].expand_as(fitted), atol=1e-5)


def test_the_centre_is_cropped_without_distortion() -> None:
    """A horizontal ramp twice as wide as the video is cropped to its middle half with an unchanged slope."""
    ramp = torch.linspace(0, 1, 80).expand(3, 40, 80)
    fitted = fit_image(ramp, 20, 20)
    expected = (torch.arange(20) + 0.5 + 10) * 2 / 80
    assert torch.allclose(fitted[:, :, 2:-2], expected[2:-2].expand(3, 20, 16), atol=0.01)
    assert torch.allclose(fit_image(ramp.mT, 20, 20), fitted.mT, atol=1e-6)


def build(folder: Path, lines: list[dict], **settings) -> PromptShards:
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def encode(texts):
        return {"prompt_embeds": torch.tensor([[[float(len(text))]] for text in texts])}

    build_shards([folder / "p.jsonl"], folder / "out", encode, EncoderStamp("stub", "0", 1), **settings)
    return PromptShards(folder / "out")


def save(folder: Path, count: int = 6, kind: str = "JPEG") -> list[dict]:
    (folder / "images").mkdir()
    for i in range(count):
        (folder / "images" / f"{i}.png").write_bytes(encoded(np.roll(RGB, i, axis=1), kind))
    return [{"prompt": f"prompt {i}", "image": f"images/{i}.png"} for i in range(count)]


def test_images_are_restored_byte_for_byte_and_as_pixels(tmp_path: Path) -> None:
    lines = save(tmp_path)
    shards = build(tmp_path, lines, shard_size=4)
    assert shards.has_images("train")
    sources = {line["prompt"]: (tmp_path / line["image"]).read_bytes() for line in lines}
    assert {r.prompt: r.media["image"] for r in shards.records()} == {p: ("jpg", d) for p, d in sources.items()}
    with tarfile.open(tmp_path / "out" / "prompts-000001.tar") as tar:
        assert "000000005.image.jpg" in tar.getnames()
    batch = next(PromptStream(shards, "train", 0, 4, size=(8, 16)))
    for text, image in zip(batch.texts, batch.images, strict=True):
        assert torch.equal(image, fit_image(decode_image(sources[text], "it"), 8, 16))
    assert next(PromptStream(shards, "train", 0, 4)).images is None
    shards.verify()


def test_a_modified_image_is_reported_with_its_record(tmp_path: Path) -> None:
    build(tmp_path, save(tmp_path, kind="PNG"))
    path = tmp_path / "out" / "prompts-000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmember("000000003.image.png")
    data[member.offset_data + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"record 000000003: its image does not match its sha256"):
        PromptShards(tmp_path / "out").verify()


def test_prompts_without_images_are_counted_per_split(tmp_path: Path) -> None:
    lines = save(tmp_path)
    lines[0].pop("image")
    shards = build(tmp_path, [*lines, {"prompt": "text only", "split": "heldout"}])
    assert not shards.has_images("heldout")
    assert as_batch(list(shards.records("heldout")), size=(8, 8)).images is None
    with pytest.raises(ShardError, match=r"5 prompts of the split 'train' .* have an image, 1 have none"):
        PromptStream(shards, "train", 0, 2, size=(8, 8))
    with pytest.raises(ShardError, match=r"5 prompts have an image, 1 of the same batch"):
        as_batch(list(shards.records("train")), size=(8, 8))
    assert next(PromptStream(shards, "train", 0, 6)).images is None  # text-to-video can still read them


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("none.png", r"none.png does not exist"),
        ("../p.png", r"'../p.png' leads out of the folder"),
        ("images/../../p.png", r"leads out of the folder"),
        ("/etc/passwd", r"leads out of the folder"),
        ("p.jsonl", r"the file is not a PNG, JPEG, WEBP image"),
    ],
)
def test_an_unusable_image_is_reported_with_its_line(tmp_path: Path, image: str, message: str) -> None:
    with pytest.raises(PromptFileError, match=rf"p.jsonl:2: .*{message}"):
        build(tmp_path, [*save(tmp_path, 1), {"prompt": "x", "image": image}])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_video(tmp_path / "v.mp4", torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 8)
    return tmp_path / "v.mp4"


def test_a_video_is_restored_byte_for_byte(clip: Path) -> None:
    shards = build(clip.parent, [{"prompt": "like this", "video": clip.name}])
    assert shards.record(0).media["video"] == ("mp4", clip.read_bytes())
    assert not shards.has_images("train")
    shards.verify()


def test_an_undecodable_video_is_reported_with_its_line(clip: Path) -> None:
    clip.write_bytes(clip.read_bytes()[:-500])
    with pytest.raises(PromptFileError, match=r"p.jsonl:1: .*v.mp4 .*is it complete"):
        build(clip.parent, [{"prompt": "like this", "video": clip.name}])


def test_a_file_of_another_type_is_named(clip: Path) -> None:
    with pytest.raises(PromptFileError, match=r"v.avi: reference videos are mp4, mkv, mov, webm files"):
        build(clip.parent, [{"prompt": "like this", "video": clip.rename(clip.with_suffix(".avi")).name}])


def test_verify_decodes_videos_whose_hash_matches(clip: Path) -> None:
    """Another program could write such a folder: every hash matches, but the video does not decode."""
    build(clip.parent, [{"prompt": "like this", "video": clip.name}])
    shard, data = clip.parent / "out" / "prompts-000000.tar", clip.read_bytes()
    with tarfile.open(shard) as tar:
        place = tar.getmember("000000000.video.mp4").offset_data
    broken = data[:64] + bytes(len(data) - 64)
    content = shard.read_bytes().replace(
        hashlib.sha256(data).hexdigest().encode(), hashlib.sha256(broken).hexdigest().encode()
    )
    content = content.replace(b'"xxh3"', b'"none"')
    shard.write_bytes(content[:place] + broken + content[place + len(data) :])
    with pytest.raises(VideoError, match=r"prompts-000000.tar: prompt 'like this'.*is it complete"):
        PromptShards(clip.parent / "out").verify()
