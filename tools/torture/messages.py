"""Raw requests to a reward server, right and wrong ones, each with the answers that it must get."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tools.torture.drafts import Draft, Values, right, scores_if_right

Answer = tuple[int, Values | None]  # status and scores
LIMIT = 10.0  # seconds for the answer to a message that arrives at once
SLOWEST = 70.0  # seconds until a client is disconnected: the server's patience with the head, then with the body
TRICKLE = 0.5  # seconds between two bytes of a slow client


@dataclass(frozen=True)
class Message:
    """A raw request.

    Attributes:
        pieces: sent one after another, with pauses.
        answers: what it must get; empty: status 4xx, or a closed connection.
        ends: the client closes its side after the last piece.
    """

    name: str
    pieces: tuple[bytes, ...]
    answers: tuple[Answer, ...] = ()
    pause: float = 0.0
    ends: bool = False
    limit: float = LIMIT


BIG = 10**400
FIELDS: dict[str, list[Any]] = {  # wrong values of the fields of a header
    "videos": [
        *([], None, "2", 2, [1], [1] * 5, [0, 1, 1, 1], [-1, -1, 1, 1], [1.5, 1, 1, 1], [65536] * 4, [BIG, 1, 1, 1]),
        *(["1", 1, 1, 1], [True, 1, 1, 1], [[1], 1, 1, 1], [float("nan"), 1, 1, 1], {"0": 1}, [2**63, 2**63, 2, 2]),
    ],
    "fps": [0, -1, -0.0, float("nan"), float("inf"), -float("inf"), "8", True, None, [8], {}, BIG],
    "texts": [[], None, "red", [1], [None], [["red"]], ["red"] * 4, ["r" * 20_001], ["\ud800"], {"0": "red"}],
    "images": [0, 1, "true", "", None, [], 1.0],
    "pixels": [1], "dtype": ["uint8"], "": [0],
}  # fmt: skip


def wrong_field(draft: Draft, rng: random.Random) -> Draft:
    name = rng.choice(list(FIELDS))
    value = rng.choice(FIELDS[name])
    if name == "texts" and isinstance(value, list) and len(value) == 1:
        value = value * draft.header["videos"][0]
    if name == "videos" and isinstance(value, list) and len(value) == 4 and value[1:] == [1, 1, 1]:
        draft.header, draft.pixels = {"videos": [], "fps": 8, "texts": ["red"], "images": False}, bytes(3)
    draft.header[name] = value
    return draft


def wrong_size(draft: Draft, rng: random.Random) -> Draft:
    more = rng.randint(1, 100)
    draft.pixels = rng.choice([draft.pixels + bytes(more), draft.pixels[:-more], b"", draft.pixels * 2])
    return draft


def wrong_json(draft: Draft, rng: random.Random) -> Draft:
    text = json.dumps(draft.header).encode()
    many = b", ".join(b'"%d": 0' % (n % 60_000) for n in range(60_001))
    draft.json = rng.choice([
        b"[" * rng.choice([101, 5_000, 200_000]), b'{"a":' * 50_000, b'{"videos":' + b"9" * 5000,
        text.replace(b'"fps": ', b'"fps": ' + b"9" * 5000), text.replace(b'"fps"', b'"fps": 3, "fps"'), text * 2,
        text[:-1], text + b"}", text.decode().encode("utf-16"), b"[1]", b"null", b" ",
        b"\x80\x04pickle", text.replace(b'"', b"'"), b" " * 2**20 + text, text.replace(b"{", b'{"\xff": 1, '),
        b"{" + many + b"}",
    ])  # fmt: skip
    return draft


def wrong_token(draft: Draft, rng: random.Random) -> Draft:
    token = draft.token
    draft.headers["Authorization"] = rng.choice([
        "", token, f"bearer {token}", f"Bearer  {token}", f"Bearer {token}x", f"Bearer {token[:-1]}", "Bearer \xff",
        f"Basic {token}", f"Bearer {token}, Bearer {token}", "Bearer " + "x" * 30_000, "Bearer",
    ])  # fmt: skip
    return draft


def wrong_length(draft: Draft, rng: random.Random) -> Draft:
    size = len(draft.body)
    draft.headers["Content-Length"] = rng.choice([
        "", "-1", f"+{size}", f"{size}.0", f"{size:#x}", "9" * 20, "9" * 5000, "\xb2", "a", f"{size}, {size + 1}",
        str(2**21 + 1), str(2**63), "0", str(size // 2), f"{size} {size}",
    ])  # fmt: skip
    return draft


def wrong_headers(draft: Draft, rng: random.Random) -> Draft:
    size, own = len(draft.body), draft.headers["X-Request-Id"]
    draft.more = rng.choice([
        [f"Content-Length: {size + 1}".encode()], [f"X-Request-Id: {own}".encode()], [b"X-Request-Id: another-id"],
        [f"Authorization: Bearer {draft.token}".encode()], [b"Authorization: Bearer guess"],
        [b"Transfer-Encoding: chunked"], [b"Transfer-Encoding: gzip"], [b"transfer-encoding: identity, chunked"],
        [b"Host: b"], [b"no colon"], [b": no name"], [b"name with spaces: 1"], [b"X: \x00"], [b" folded"], [b"X : 1"],
        [b"X-%d: %d" % (n, n) for n in range(30_000)], [b"X: " + b"x" * 400_000], [b"X: 1"] * 80_000,
    ])  # fmt: skip
    return draft


def wrong_id(draft: Draft, rng: random.Random) -> Draft:
    draft.headers["X-Request-Id"] = rng.choice(["", "short", "../../etc/passwd", "a" * 65, "with space", "\xe9" * 9])
    return draft


def wrong_line(draft: Draft, rng: random.Random) -> Draft:
    draft.line = rng.choice([
        b"GET /score HTTP/1.1", b"PUT /score HTTP/1.1", b"HEAD /reward HTTP/1.1", b"DELETE / HTTP/1.1", b"POST /score",
        b"POST /scores HTTP/1.1", b"POST //score HTTP/1.1", b"POST /score/../score HTTP/1.1", b"POST * HTTP/1.1",
        b"POST /score\x00 HTTP/1.1", b"POST /%ff%00 HTTP/1.1", b"POST /score HTTP/2.0", b"POST /score HTTP/11",
        b"POST http://a/score HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"TRACE / HTTP/1.1",
        b"P\xd6ST /score HTTP/1.1", b"POST /" + b"x" * 70_000 + b" HTTP/1.1", b"PRI * HTTP/2.0", b"",
        b"POST  /score HTTP/1.1", b"post /score HTTP/1.1",
    ])  # fmt: skip
    return draft


WRONG: dict[str, Callable[[Draft, random.Random], Draft]] = {
    "wrong field": wrong_field,
    "wrong size": wrong_size,
    "wrong JSON": wrong_json,
    "wrong token": wrong_token,
    "wrong length": wrong_length,
    "wrong headers": wrong_headers,
    "wrong id": wrong_id,
    "wrong line": wrong_line,
}


def edited(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three random changes."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        end, new = min(len(data), start + rng.randint(0, 4)), rng.randbytes(rng.randint(0, 3))
        typed = bytes(rng.choices(b'0123456789{}[]:,."\\ \r\n-e', k=rng.randint(0, 2)))
        data = data[:start] + rng.choice([b"", new, typed, data[start:end] * 2]) + data[end:]
    return data


def random_message(rng: random.Random, token: str) -> Message:
    draft, kind = right(rng, token), rng.choice(["bytes", "head", "head", "JSON", "JSON"])
    if kind == "JSON":
        draft.json = edited(json.dumps(draft.header).encode(), rng)
    raw = {"bytes": rng.randbytes(rng.randint(1, 5000)), "JSON": bytes(draft)}.get(kind)
    raw = raw if raw is not None else edited(draft.head(), rng) + draft.body
    values = scores_if_right(raw, token)
    return Message(f"random change: {kind}", (raw,), () if values is None else ((200, values),))


def wrong_message(rng: random.Random, token: str) -> Message:
    kind = rng.choice(list(WRONG))
    return Message(kind, (bytes(WRONG[kind](right(rng, token), rng)),))


def cut_message(rng: random.Random, token: str) -> Message:
    raw = bytes(right(rng, token))
    return Message("cut", (raw[: rng.randrange(len(raw))],), ends=True)


def flood(rng: random.Random, token: str) -> Message:
    """More than a server should keep: a head, a body, a chunk or requests without end."""
    draft = right(rng, token)
    draft.headers["Content-Length"] = "0"
    head, mebibyte = draft.head(), bytes(2**20)
    kinds = {
        "head": (head[:-2], *(b"X-%d: 1\r\n" % n for n in range(3000)), b"X: ", *[b"x" * 2**16] * 64),
        "body": (head.replace(b"Length: 0", b"Length: %d" % 2**21), mebibyte, mebibyte[:-1], b"!" * 2**22),
        "claim": (head.replace(b"Length: 0", b"Length: %d" % 2**40), *[mebibyte] * 16),
        "requests": (head * 500,),
    }
    kind = rng.choice(list(kinds))
    return Message(f"flood: {kind}", kinds[kind])


def right_message(rng: random.Random, token: str) -> Message:
    first, second = right(rng, token), right(rng, token)
    one, two = (200, first.values), (200, second.values)
    again = Draft(token, second.header, second.pixels, headers=dict(first.headers))
    wrong = WRONG["wrong id"](right(rng, token), rng)
    raw, middle = bytes(first), rng.randrange(len(bytes(first)))
    pieces = tuple(raw[start : start + 1 + len(raw) // 8] for start in range(0, len(raw), 1 + len(raw) // 8))
    health = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    return rng.choice([
        Message("right: two at once", (raw + bytes(second),), (one, two)),
        Message("right: twice", (raw, raw), (one, one)),
        Message("right: an id for two", (raw, bytes(again)), (one, (409, None))),
        Message("right: before a wrong one", (raw, bytes(wrong)), (one, (400, None))),
        Message("right: after a wrong one", (bytes(wrong), raw), ((400, None), one)),
        Message("right: in two pieces", (raw[:middle], raw[middle:]), (one,), pause=0.1),
        Message("right: in many pieces", pieces, (one,), pause=0.2),
        Message("right: health", (health * 3,), ((200, None),) * 3),
    ])  # fmt: skip


def slow_message(rng: random.Random, token: str) -> Message:
    """A client that is silent or trickles, from some point of its request on."""
    header = {"videos": [1, 1, 30, 30], "fps": 8, "texts": ["red"]}
    raw = bytes(Draft(token, header, bytes(2700), headers={"X-Request-Id": f"{rng.getrandbits(128):032x}"}))
    start = rng.randrange(len(raw) - 2000)
    if rng.random() < 0.5:
        return Message("slow: silent", (raw[:start],), limit=SLOWEST)
    pieces = [bytes([byte]) for byte in raw[start : start + int(SLOWEST / TRICKLE)]]
    return Message("slow: trickles", (raw[:start], *pieces), pause=TRICKLE, limit=SLOWEST)


KINDS: dict[Callable[[random.Random, str], Message], int] = {  # their shares
    random_message: 30,
    wrong_message: 50,
    cut_message: 5,
    flood: 2,
    right_message: 13,
}


def messages(rng: random.Random, token: str) -> Iterator[Message]:
    while True:
        yield rng.choices(list(KINDS), list(KINDS.values()))[0](rng, token)
