"""Random changes of a right file: of a value in its data, or of its bytes."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.torture.known import lines_of

WEIRD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e308, float("inf"), float("nan"), 0.5, -0.0),
    *("", "x", "1", "1e-4", "a" * 10_000, "\ud800", "a\x00b", "ü", "a\nb"),
    *([], {}, [[]], {"": 0}, [None] * 3, {"a": {"b": [1, {"c": None}]}}),
]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def change_tree(tree: Any, rng: random.Random) -> Any:
    """Plain data with one value dropped, replaced, renamed, repeated, or nested deeply."""
    places = [
        (above, key) for above in parts(tree) for key in (above if isinstance(above, dict) else range(len(above)))
    ]
    if not places or rng.random() < 0.03:
        return rng.choice(WEIRD)
    above, key = rng.choice(places)
    kind = rng.choice(["drop", "retype", "retype", "retype", "rename", "deep", "move", "repeat"])
    if kind == "drop":
        del above[key]
    elif kind == "rename" and isinstance(above, dict):
        above[f"{key}{rng.choice(['x', ' ', '.', '😀'])}"] = above.pop(key)
    elif kind == "deep":
        above[key] = nested(rng.choice([50, 300, 900]))
    elif kind == "move":
        above[key] = json.loads(json.dumps(rng.choice(list(parts(tree)))))
    elif kind == "repeat" and isinstance(above, list):
        above.extend(above[key : key + 1] * rng.choice([1, 3]))
    else:
        above[key] = rng.choice(WEIRD)
    return tree


def parts(tree: Any) -> Iterator[Any]:
    """Every list and object of plain data."""
    if isinstance(tree, (dict, list)):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from parts(child)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    changes: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
        lambda: (
            data[:place] + rng.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b'"', b"{", b"\x1b[2J"]) + data[place:]
        ),
        lambda: data[:place] + data[max(0, place - 40) :],
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "cp1252"]), "replace"),
        lambda: gzip.compress(data, mtime=0),
        lambda: data * rng.choice([2, 50]),
        lambda: bytes(rng.randrange(256) for _ in range(rng.choice([1, 100, 5000]))),
    ]
    return rng.choice(changes)()


def changed(file: str, content: str, rng: random.Random) -> bytes:
    """A changed file: a value of its data, or some of its bytes."""
    suffix = Path(file).suffix
    if suffix not in (".yaml", ".json", ".jsonl") or rng.random() < 0.4:
        return change_bytes(content.encode(), rng)
    if suffix == ".yaml":
        return json.dumps(change_tree(yaml.safe_load(content), rng)).encode()  # JSON is YAML
    if suffix == ".json":
        return json.dumps(change_tree(json.loads(content), rng)).encode()
    return lines_of(change_tree([json.loads(line) for line in content.splitlines()], rng)).encode()
