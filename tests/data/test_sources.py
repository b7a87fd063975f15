"""Sources of shards: folders, globs, ranges, URLs and commands give the same records; errors name the source."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import EncoderStamp, PromptRecord, ShardError
from tests.made.prompt_folders import write_shards

NEGATIVE = {"prompt_embeds": torch.ones(3, 2)}
RANGE = "prompts-{000001..000002}.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of two prompts each; the last shard is held out."""
    records = [
        PromptRecord(
            id=i,
            prompt=f"prompt {i}",
            split="heldout" if i > 5 else "train",
            conditioning={"prompt_embeds": torch.full((2, 2), i + 1.0)},
        )
        for i in range(8)
    ]
    write_shards(records, tmp_path / "shards", negative=NEGATIVE, policy=EncoderStamp("x", "0", 3), shard_size=2)
    return tmp_path / "shards"


@pytest.fixture
def requested() -> list[str]:
    """Paths of the requests that the server below received."""
    return []


@pytest.fixture
def url(folder: Path, requested: list[str]) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            requested.append(self.path.removeprefix("/"))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def ids(source: str, cache: Path) -> list[int]:
    shards = PromptShards(source, cache)
    shards.verify()
    assert torch.equal(shards.negative["prompt_embeds"], NEGATIVE["prompt_embeds"])
    assert sum(shards.splits.values()) == len(shards)
    return [record.id for record in shards.records()]


def test_every_kind_of_source_gives_the_same_records(folder: Path, url: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for whole in (folder, f"{folder}/", url, f"{url}/", f"pipe:cat {folder}/prompts-{{000000..000003}}.tar"):
        assert ids(str(whole), cache) == list(range(8)), whole
    for part in (
        f"{folder}/prompts-00000[12].tar",
        f"{folder}/{RANGE}",
        f"{url}/{RANGE}",
        f"pipe:cat {folder}/{RANGE}",
    ):
        assert ids(part, cache) == [2, 3, 4, 5], part
    assert ids(f"{folder}/prompts-000003.tar", cache) == [6, 7]


def test_a_subset_of_shards_counts_only_its_prompts(folder: Path, tmp_path: Path) -> None:
    shards = PromptShards(f"{folder}/prompts-{{000002..000003}}.tar", tmp_path)
    assert shards.splits == {"train": 2, "heldout": 2}
    assert PromptShards(f"{folder}/{RANGE}", tmp_path).splits == {"train": 4, "heldout": 0}
    with pytest.raises(ShardError, match="no split 'heldout'"):
        PromptShards(f"{folder}/{RANGE}", tmp_path).rows("heldout")


def test_files_at_a_url_are_copied_once(url: str, requested: list[str], tmp_path: Path) -> None:
    """This holds for ranks that start at the same time."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ids(f"{url}/{RANGE}", tmp_path / "cache"), range(4)))
    assert found == [[2, 3, 4, 5]] * 4
    assert sorted(name for name in requested if name != "index.json") == [
        "negative.safetensors",
        "prompts-000001.tar",
        "prompts-000002.tar",
    ]
    assert ids(url, tmp_path / "cache") == list(range(8))
    assert len(requested) == len(set(requested)) + 4  # the index is requested for by each


def test_s3_urls_use_the_aws_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`aws s3 cp s3://bucket/FILE -`, replaced by a script that serves the bucket."""
    tool = tmp_path / "bin" / "aws"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat "{folder}/${{3#s3://my bucket/}}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert ids(f"s3://my bucket/{RANGE}", tmp_path / "cache") == [2, 3, 4, 5]
    assert ids("s3://my bucket", tmp_path / "cache") == list(range(8))


def test_a_changed_original_is_copied_again(folder: Path, url: str, tmp_path: Path) -> None:
    assert len(ids(url, tmp_path / "cache")) == 8
    index = json.loads((folder / "index.json").read_text())
    index["shards"], index["count"] = index["shards"][:3], 6
    del index["xxh3"]
    (folder / "index.json").write_text(json.dumps(index))
    assert ids(url, tmp_path / "cache") == list(range(6))


def test_a_copy_with_a_wrong_hash_is_named_and_deleted(folder: Path, url: str, tmp_path: Path) -> None:
    shard = folder / "prompts-000002.tar"
    good = shard.read_bytes()
    for bad in (good[:-600], good.replace(b"prompt 4", b"prompt 5")):
        shard.write_bytes(bad)
        with pytest.raises(ShardError, match=r"prompts-000002.tar has the sha256 .*, the index states"):
            PromptShards(url, tmp_path / "cache")
    shard.write_bytes(good)
    assert ids(url, tmp_path / "cache") == list(range(8))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{url}/nowhere", r"nowhere/index.json cannot be read: .*exit 22"),
        ("{url}/prompts-{{000003..000004}}.tar", r"index.json has no shard prompts-000004.tar; it has prompts-000000"),
        ("{url}/prompts-*.tar", r"a URL cannot be searched"),
        ("pipe:false {folder}/prompts-000000.tar", r"cannot be read: .*exit 1"),
        ("pipe:echo hello", r"is not an index of prompt shards"),
        ("nothing://here", r"cannot be read"),
        ("{folder}/prompts-{{000003..000004}}.tar", r"nothing is at .*prompts-000004.tar"),
        ("{folder}/prompts-9*.tar", r"must name shards of one folder"),
        ("{folder}/prompts-{{0.tar", r"the braces do not match"),
    ],
)
def test_missing_sources_are_named(folder: Path, url: str, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        PromptShards(source.format(url=url, folder=folder), tmp_path / "cache")


def test_an_index_cannot_name_a_file_outside_the_cache(folder: Path, url: str, tmp_path: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = "../../evil.tar"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=r"evil.tar"):
        PromptShards(url, tmp_path / "cache")
    assert not list(tmp_path.rglob("evil.tar"))


def test_an_index_runs_no_command(folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names become parts of the commands that copy the shards."""
    monkeypatch.chdir(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = "prompts-$(touch${IFS}run)';touch${IFS}run;'.tar"
    (folder / "index.json").write_text(json.dumps(index))
    for source in (url, f"pipe:cat {folder}/prompts-000000.tar"):
        with pytest.raises(ShardError, match=r"has no shard"):
            PromptShards(source, tmp_path / "cache")
    assert not (tmp_path / "run").exists()


def test_an_unwritable_cache_is_named(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"data.cache .*file/cache cannot hold copies of shards"):
        PromptShards(url, tmp_path / "file" / "cache")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "expanduser", refuse_to_expand)
    with pytest.raises(ShardError, match=r"data.cache ~/x cannot hold .*Could not determine home directory"):
        PromptShards(url, "~/x")


def refuse_to_expand(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")  # pathlib raises this for a user without a name


@pytest.mark.parametrize("braces", ["{0..999999999}", "{0..9}" * 7, "{a,b{c,d}}" * 40, "{0..-999999999..2}"])
def test_braces_that_stand_for_very_many_names_are_refused_at_once(braces: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="stands for more than 100,000 shards"):
        PromptShards(tmp_path / f"prompts-{braces}.tar")
