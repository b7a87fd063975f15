"""A right request to a reward server, the rules of the protocol, written a second time, and the scores that it gets."""

from __future__ import annotations

import json
import random
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import h11
import torch

from bpgo_video.rewards.base import Clips, FrameScores, RewardModel

Values = list[list[float]]
REQUEST_ID = re.compile(r"[0-9a-zA-Z-]{8,64}")
KEYS = {"videos", "fps", "texts", "images"}


class Fingerprint(RewardModel):
    """Scores that every pixel, text and rate changes; the model that is served."""

    name, version, kind, range = "fingerprint", "1", "test", (-10.0, 10.0)

    def __call__(self, clips: Clips) -> FrameScores:
        time.sleep(0.005)  # so that some requests are killed while they are scored
        pixels = clips.videos.flatten(2)
        values = (pixels * torch.arange(pixels.shape[-1]).cos()).mean(dim=-1) + 1 / (1 + clips.fps)
        values = values + torch.tensor([zlib.crc32(text.encode()) / 2**32 for text in clips.texts])[:, None]
        if clips.images is not None:
            values = values - clips.images.flatten(1).mean(dim=1, keepdim=True)
        return FrameScores(values, clips.times)


@dataclass
class Draft:
    """A right POST /score, to be changed."""

    token: str
    header: dict[str, Any]
    pixels: bytes
    line: bytes = b"POST /score HTTP/1.1"
    headers: dict[str, str] = field(default_factory=dict)
    more: list[bytes] = field(default_factory=list)  # lines of the head
    json: bytes = b""

    @property
    def body(self) -> bytes:
        return (self.json or json.dumps(self.header).encode()) + b"\n" + self.pixels

    def head(self) -> bytes:
        stated = {"Host": "a", "Authorization": f"Bearer {self.token}", "Content-Length": str(len(self.body))}
        lines = [f"{name}: {value}".encode("latin-1") for name, value in (stated | self.headers).items() if value]
        return b"\r\n".join([self.line, *lines, *self.more, b"", b""])

    def __bytes__(self) -> bytes:
        return self.head() + self.body

    @property
    def values(self) -> Values:
        return scores_of(self.header, self.pixels)


def right(rng: random.Random, token: str) -> Draft:
    samples, frames, height, width = (rng.randint(1, most) for most in (3, 4, 24, 24))
    images = rng.random() < 0.2
    texts = ["".join(rng.choices('a red circle, "öß\n漢\\{}', k=rng.randint(0, 40))) for _ in range(samples)]
    header = {"videos": [samples, frames, height, width], "fps": rng.choice([8, 12.5, 1e-3]), "texts": texts}
    pixels = rng.randbytes(samples * (frames + images) * height * width * 3)
    return Draft(token, {**header, "images": images}, pixels, headers={"X-Request-Id": f"{rng.getrandbits(128):032x}"})


def clips_of(header: Mapping[str, Any], pixels: bytes) -> Clips:
    samples, frames, height, width = header["videos"]
    levels = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).float() / 255
    videos, images = levels.split([rest := samples * frames * height * width * 3, len(pixels) - rest])
    shown = images.view(samples, height, width, 3).movedim(-1, 1) if header.get("images") else None
    return Clips(videos.view(*header["videos"], 3).movedim(-1, 2), header["fps"], tuple(header["texts"]), shown)


def scores_of(header: Mapping[str, Any], pixels: bytes) -> Values:
    scores: Values = Fingerprint()(clips_of(header, pixels)).values.tolist()
    return scores


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def is_right_header(header: object, size: int) -> bool:
    """Whether the rules of the protocol, written here a second time, allow the header for that many bytes of pixels."""
    if not isinstance(header, dict) or not KEYS - {"images"} <= header.keys() <= KEYS:
        return False
    shape, fps, texts, images = header["videos"], header["fps"], header["texts"], header.get("images", False)
    if not (type(shape) is list and len(shape) == 4 and all(type(n) is int and 1 <= n <= 65536 for n in shape)):
        return False
    if type(fps) not in (int, float) or not 0 < fps < float("inf") or type(images) is not bool:
        return False
    if type(texts) is not list or len(texts) != shape[0]:
        return False
    if not all(type(text) is str and len(text) <= 20_000 and not re.search("[\ud800-\udfff]", text) for text in texts):
        return False
    return size == shape[0] * (shape[1] + images) * shape[2] * shape[3] * 3


def scores_if_right(raw: bytes, token: str) -> Values | None:
    """The scores of a POST /score; None if anything about it is wrong."""
    connection, body = h11.Connection(h11.SERVER, 2**16), b""
    connection.receive_data(raw)
    try:
        request = connection.next_event()
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
    except h11.RemoteProtocolError:
        return None
    if not isinstance(request, h11.Request) or not isinstance(event, h11.EndOfMessage):
        return None
    named = [name for name, _ in request.headers]
    sent = dict(request.headers)
    right_head = (
        request.method == b"POST"
        and request.http_version.startswith(b"1.")
        and unquote(request.target.partition(b"?")[0].decode("ascii")) == "/score"
        and all(named.count(name) == 1 for name in (b"authorization", b"x-request-id", b"content-length"))
        and b"transfer-encoding" not in sent
        and sent[b"authorization"] == f"Bearer {token}".encode()
        and REQUEST_ID.fullmatch(sent[b"x-request-id"].decode("latin-1"))
    )
    line, _, pixels = body.partition(b"\n")
    try:
        header = json.loads(line.decode(), object_pairs_hook=distinct)
    except ValueError:
        return None
    return scores_of(header, pixels) if right_head and is_right_header(header, len(pixels)) else None
