"""Building of prompt shards: interruption, several ranks, repeated texts, invalid input and bounded memory."""

from __future__ import annotations

import gc
import json
import re
import shutil
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bpgo_video.data.prompt_formats import PromptFileError
from bpgo_video.data.prompt_plan import make_plan
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import EncoderStamp, ShardError, prompt_id
from bpgo_video.data.stream import as_batch
from bpgo_video.data.writer import SKIPPED, Build, Encode, build_shards

STAMP = EncoderStamp("stub", "0123456789abcdef", 4)


class Encoder:
    """A stub encoder that counts its calls per text and can be interrupted."""

    def __init__(self, calls: int | None = None) -> None:
        self.texts: Counter[str] = Counter()
        self._calls_left = calls

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        if self._calls_left == 0:
            raise KeyboardInterrupt
        self._calls_left = self._calls_left and self._calls_left - 1
        self.texts.update(texts)
        rows = [[[float(prompt_id(text) % 1009)], [1.0], [0.0], [0.0]] for text in texts]
        return {"prompt_embeds": torch.tensor(rows)}


def write_lines(path: Path, lines: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job(path: Path, output: Path, encode: Encode, on_error: str = "stop", **settings) -> Build:
    return Build(make_plan([path], on_error=on_error), output, encode, STAMP, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """25 prompts, of which every fifth has the same text."""
    texts = [f"prompt {i}" if i % 5 else "again" for i in range(25)]
    return write_lines(tmp_path / "p.jsonl", [{"prompt": text, "id": i} for i, text in enumerate(texts)])


def test_equal_texts_are_encoded_once(prompts: Path, tmp_path: Path) -> None:
    encode = Encoder()
    assert job(prompts, tmp_path / "out", encode, shard_size=4, batch_size=3).run()
    assert set(encode.texts.values()) == {1}
    assert len(encode.texts) == 20 + 1 + 1  # unique texts, "again", and the negative prompt
    for record in PromptShards(tmp_path / "out").records():
        assert torch.equal(record.conditioning["prompt_embeds"], Encoder()([record.prompt])["prompt_embeds"][0])


@pytest.fixture
def guided(tmp_path: Path) -> Path:
    """12 prompts: four use the folder's negative prompt (two explicitly), the others one of three negative prompts."""
    negative_prompts = ["blurry", None, "dark", "folder's", "blurry", "prompt 1"]
    lines = [{"prompt": f"prompt {i}", "id": i, "negative_prompt": negative_prompts[i % 6]} for i in range(12)]
    return write_lines(tmp_path / "n.jsonl", [{k: v for k, v in line.items() if v is not None} for line in lines])


def test_each_prompt_has_its_negative_prompt_or_that_of_the_folder(guided: Path, tmp_path: Path) -> None:
    encode = Encoder()
    job(guided, tmp_path / "out", encode, shard_size=5, batch_size=4, negative_prompt="folder's").run()
    assert set(encode.texts.values()) == {1}
    assert set(encode.texts) == {*(f"prompt {i}" for i in range(12)), "blurry", "dark", "folder's"}
    shards = PromptShards(tmp_path / "out")
    negative_prompts = ["blurry", None, "dark", "folder's", "blurry", "prompt 1"] * 2
    records = list(shards.records())
    assert [record.negative_prompt for record in records] == negative_prompts
    batch = as_batch(records)
    assert len(batch.negative["prompt_embeds"]) == 5, (
        "for twelve prompts, including the folder's, by default and by name"
    )
    assert batch.negative_rows is not None
    for record, row in zip(records, batch.negative_rows, strict=True):
        expected = Encoder()([record.negative_prompt or "folder's"])["prompt_embeds"][0]
        assert torch.equal(record.negative["prompt_embeds"], expected)
        assert torch.equal(batch.negative["prompt_embeds"][row], expected)
    shards.verify()


def test_a_shard_stores_equal_embeddings_once_and_is_self_contained(guided: Path, tmp_path: Path) -> None:
    job(guided, tmp_path / "out", Encoder(), shard_size=6).run()
    with tarfile.open(tmp_path / "out" / "prompts-000000.tar") as tar:
        names = [member.name for member in tar if "safetensors" in member.name]
    texts = [f"{i:09d}.safetensors" for i in range(6)]
    negatives = [f"{i:09d}.negative.safetensors" for i in (0, 2, 3)]  # 4 shares that of 0, 5 the text of 1
    assert sorted(names) == sorted(texts + negatives)
    alone = PromptShards(tmp_path / "out" / "prompts-00000[1].tar")
    assert [record.negative_prompt for record in alone.records()] == ["blurry", None, "dark", "folder's", "blurry",
                                                                      "prompt 1"]  # fmt: skip
    alone.verify()


def test_a_damaged_negative_prompt_is_named(guided: Path, tmp_path: Path) -> None:
    job(guided, tmp_path / "out", Encoder(), shard_size=12).run()
    path = tmp_path / "out" / "prompts-000000.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember("000000002.negative.safetensors")
    content = bytearray(path.read_bytes())
    content[member.offset_data + member.size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match="record 000000002: its negative does not match its sha256"):
        PromptShards(tmp_path / "out").verify()


def test_repeated_texts_are_stored_once_per_shard(prompts: Path, tmp_path: Path) -> None:
    job(prompts, tmp_path / "out", Encoder(), shard_size=25).run()
    with tarfile.open(tmp_path / "out" / "prompts-000000.tar") as tar:
        assert sum(member.name.endswith("safetensors") for member in tar) == 21
    damaged = tmp_path / "out" / "prompts-000000.tar"
    with tarfile.open(damaged) as tar:
        first = tar.getmember("000000000.safetensors")
    content = bytearray(damaged.read_bytes())
    content[first.offset_data + first.size - 1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ShardError, match="record 000000020: its conditioning does not match"):
        PromptShards(tmp_path / "out").record(20)


@pytest.mark.parametrize("calls", range(0, 14, 2))
def test_an_interrupted_build_resumes_to_identical_bytes(prompts: Path, tmp_path: Path, calls: int) -> None:
    settings = {"shard_size": 4, "batch_size": 3, "negative_prompt": "bad"}
    job(prompts, tmp_path / "whole", Encoder(), **settings).run()
    first, second = Encoder(calls), Encoder()
    with pytest.raises(KeyboardInterrupt):
        job(prompts, tmp_path / "out", first, **settings).run()
    finished = len(list((tmp_path / "out").glob("prompts-*.tar")))
    (tmp_path / "out" / ".prompts-000001.tar.partial-0").write_bytes(b"of a build that was killed")
    job(prompts, tmp_path / "out", second, **settings).run()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = {text for text, count in (first.texts + second.texts).items() if count > 1}
    assert again <= {f"prompt {i}" for i in range(4 * finished, 4 * finished + 4)}  # of the truncated shard


def test_a_folder_without_an_index_is_refused_by_the_reader(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        job(prompts, tmp_path / "out", Encoder(6), shard_size=4, batch_size=3).run()
    with pytest.raises(
        ValueError, match=r"index.json is missing: the folder holds no prompt shards, or their build did not finish"
    ):
        PromptShards(tmp_path / "out")


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_several_ranks_write_the_same_shards_as_one(prompts: Path, tmp_path: Path, world_size: int) -> None:
    settings = {"shard_size": 4, "batch_size": 3}
    job(prompts, tmp_path / "whole", Encoder(), **settings).run()
    encoders = [Encoder() for _ in range(world_size)]
    jobs = [job(prompts, tmp_path / "out", encode, **settings) for encode in encoders]
    complete = [one.run(rank, world_size) for rank, one in enumerate(jobs)]
    assert complete == [rank >= min(world_size, 7) - 1 for rank in range(world_size)]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    single = sum((Counter(e.texts) for e in encoders), Counter())
    assert {single[f"prompt {i}"] for i in range(25) if i % 5} == {1}
    assert single["again"] == 1
    assert all(not encode.texts for encode in encoders[7:])  # ranks without a shard never load the encoder


def test_a_finished_build_is_unchanged_and_another_is_refused(prompts: Path, tmp_path: Path) -> None:
    job(prompts, tmp_path / "out", Encoder()).run()
    before = contents(tmp_path / "out")
    again = Encoder(0)
    assert job(prompts, tmp_path / "out", again).run()
    assert contents(tmp_path / "out") == before
    with pytest.raises(FileExistsError, match=r"or settings \(shard_size 1000, here 8\)\. .*run: overwrite=True"):
        job(prompts, tmp_path / "out", again, shard_size=8).run()
    with prompts.open("a") as stream:
        stream.write('{"prompt": "one more"}\n')
    with pytest.raises(FileExistsError, match=r"\(other prompts; count 25, here 26\)"):
        job(prompts, tmp_path / "out", again).run()


def test_shards_stay_whole_until_those_that_replace_them_are_complete(prompts: Path, tmp_path: Path) -> None:
    output, small = tmp_path / "out", {"shard_size": 4, "overwrite": True}
    job(prompts, output, Encoder()).run()
    before = contents(output)
    with pytest.raises(KeyboardInterrupt):
        job(prompts, output, Encoder(4), **small).run()
    assert contents(output) == before
    with pytest.raises(KeyboardInterrupt):
        job(prompts, output, Encoder(1), shard_size=5, overwrite=True).run()
    encoders = [Encoder(), Encoder()]
    jobs = [job(prompts, output, encode, **small) for encode in encoders]
    assert [one.run(rank, 2) for rank, one in enumerate(jobs)] == [False, True]
    job(prompts, tmp_path / "whole", Encoder(), shard_size=4).run()
    assert contents(output) == contents(tmp_path / "whole")
    assert sum(sum(encode.texts.values()) for encode in encoders) < 22, "the interrupted build was continued"
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith(".")]
    assert job(prompts, output, Encoder(0), **small).run(), "a finished build is left as it is"


@pytest.mark.parametrize("at", ["between the renames", "after them", "while the old ones are removed"])
def test_a_kill_while_shards_take_their_place_loses_none(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    output, new = tmp_path / "out", {"shard_size": 4, "overwrite": True}
    job(prompts, output, Encoder()).run()
    before, moved = contents(output), []
    rename, rmtree = Path.rename, shutil.rmtree

    def killed_rename(path: Path, target: Path) -> Path:
        moved.append(path)
        if len(moved) == 2 and at == "between the renames":
            raise KeyboardInterrupt
        return rename(path, target)

    def killed_rmtree(path: Path, **options: object) -> None:
        if ".old-" in path.name:
            if at == "while the old ones are removed":
                (path / "prompts-000000.tar").unlink()
            raise KeyboardInterrupt
        rmtree(path, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed_rename)
        patched.setattr(shutil, "rmtree", killed_rmtree)
        with pytest.raises(KeyboardInterrupt):
            job(prompts, output, Encoder(), **new).run()
    if at == "between the renames":
        assert not output.exists()
        assert job(prompts, output, Encoder(0)).run(), "the old shards are back"
        assert contents(output) == before
    assert job(prompts, output, Encoder(0), **new).run(), "nothing is encoded again"
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith(".")]
    job(prompts, tmp_path / "whole", Encoder(), shard_size=4).run()
    assert contents(output) == contents(tmp_path / "whole")


STRANGE = (
    b'{"prompt": "fine"}\n'
    b"\n"
    b'{"prompt": "bell \\u0007"}\n'
    b'{"prompt": "half a pair \\ud800"}\n'
    b'{"prompt": "latin \xe9"}\n'
    b'{"prompt": "' + 10_000 * b"x" + b'"}\n'
    b'{"prompt": "fine"}\n'
    b'{"prompt": "other", "image": "broken.png"}\n'
    b'{"prompt": "other", "tags": [1]}\n' + 5000 * b"[" + b"\n" + b'{"prompt": "last", "id": 3}\n'
)
REASONS = {
    2: "the line is empty",
    3: "U\\+0007, a control character",
    4: "U\\+D800, text that is not UTF-8",
    5: "is not UTF-8",
    6: "has 10000 characters",
    9: "the tag 1 is not a string",
    10: "nested more than 64 levels deep",
    7: "that of an earlier prompt",
    8: "broken.png: the file is not a PNG, JPEG, WEBP image",
}


def test_invalid_prompts_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(STRANGE)
    (tmp_path / "broken.png").write_bytes(b"hello")
    job(tmp_path / "p.jsonl", tmp_path / "out", Encoder(), on_error="skip", shard_size=1).run()
    shards = PromptShards(tmp_path / "out")
    assert [record.prompt for record in shards.records()] == ["fine", "last"]
    assert shards.index["build"]["skipped"] == len(REASONS)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2  # only the shard with the broken image is missing
    listed = [json.loads(line) for line in (tmp_path / "out" / SKIPPED).read_text().splitlines()]
    assert {int(entry["place"].rsplit(":")[-1]) for entry in listed} == REASONS.keys()
    for entry in listed:
        assert re.search(REASONS[int(entry["place"].removeprefix(f"{tmp_path / 'p.jsonl'}:"))], entry["reason"])
    shards.verify()


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 9, 10, 8])
def test_each_invalid_prompt_stops_a_strict_build(tmp_path: Path, number: int) -> None:
    lines = STRANGE.split(b"\n")
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([lines[0], lines[number - 1], lines[-2]]) + b"\n")
    (tmp_path / "broken.png").write_bytes(b"hello")
    with pytest.raises(PromptFileError, match=rf"p.jsonl:2: .*{REASONS[number]}"):
        build_shards([tmp_path / "p.jsonl"], tmp_path / "out", Encoder(), STAMP)


def test_a_build_resumes_after_an_invalid_image_is_repaired_or_skipped(tmp_path: Path) -> None:
    lines = [*({"prompt": f"prompt {i}"} for i in range(8)), {"prompt": "x", "image": "x.png"}]
    path = write_lines(tmp_path / "p.jsonl", lines)
    (tmp_path / "x.png").write_bytes(b"hello")
    with pytest.raises(PromptFileError, match=r"p\.jsonl:9"):
        job(path, tmp_path / "out", Encoder(), shard_size=4).run()
    encode = Encoder()
    job(path, tmp_path / "out", encode, on_error="skip", shard_size=4).run()
    assert not encode.texts  # eight prompts are complete, the ninth was skipped
    assert len(PromptShards(tmp_path / "out")) == 8


def test_a_single_endless_line_is_not_a_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"one\n" + bytes(3 * 2**20))
    with pytest.raises(PromptFileError, match=r"p.txt:2: the line is longer than 1 MiB"):
        make_plan([tmp_path / "p.txt"], on_error="skip")


def peak_bytes(folder: Path, count: int) -> int:
    folder.mkdir()
    path = folder / "p.txt"
    with path.open("w") as stream:
        stream.writelines(f"prompt {i:09d} {1500 * 'x'}\n" for i in range(count))
    build = {"shard_size": 50, "batch_size": 10}
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()  # in a process with many objects, full collections are rare
    gc.set_threshold(50, 5, 5)  # uncollected reference cycles would double the measured memory
    tracemalloc.start()
    try:
        job(path, folder / "out", lambda texts: {"prompt_embeds": torch.ones(len(texts), 4, 1)}, **build).run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def test_memory_per_prompt_is_three_integers_without_its_text(tmp_path: Path) -> None:
    """24 bytes per prompt are kept, plus temporary sorted copies; each text has 1517 characters."""
    peak_bytes(tmp_path / "warm", 100)
    small, large = peak_bytes(tmp_path / "small", 100), peak_bytes(tmp_path / "large", 600)
    assert (large - small) / 500 < 100


def test_a_build_leaves_only_the_shards(prompts: Path, tmp_path: Path) -> None:
    job(prompts, tmp_path / "out", Encoder(), shard_size=10).run()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.json", "negative.safetensors", *(f"prompts-{i:06d}.tar" for i in range(3))}
