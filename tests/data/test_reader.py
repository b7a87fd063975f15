"""Reading of prompt shards: exact records in an order fixed by (seed, position), and detection of damage."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import EncoderStamp, PromptRecord, ShardError, encoder_stamp
from bpgo_video.data.stream import PromptStream, epoch_order, window
from bpgo_video.files import fingerprint
from tests.made.prompt_folders import write_shards

TOKENS, DIM = 6, 4
STAMP = EncoderStamp("tiny", "0123456789abcdef", TOKENS)
NEGATIVE = {"prompt_embeds": torch.full((TOKENS, DIM), 0.5)}


def embeds(number: int, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(number))


def records(count: int, heldout: int = 3) -> list[PromptRecord]:
    return [
        PromptRecord(
            id=1000 + i,
            prompt=f"prompt {i} – ünïcode",
            split="heldout" if i < heldout else "train",
            tags=("clear",) if i % 2 else (),
            conditioning={"prompt_embeds": embeds(i, 1 + i % TOKENS)},
        )
        for i in range(count)
    ]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_shards(records(20), tmp_path / "shards", negative=NEGATIVE, policy=STAMP, shard_size=7)
    return tmp_path / "shards"


def test_every_field_is_restored_bit_for_bit(directory: Path) -> None:
    shards = PromptShards(directory)
    for wrote, read in zip(records(20), shards.records(), strict=True):
        assert (read.id, read.prompt, read.split, read.tags) == (wrote.id, wrote.prompt, wrote.split, wrote.tags)
        tokens = wrote.conditioning["prompt_embeds"]
        assert torch.equal(read.conditioning["prompt_embeds"][: len(tokens)], tokens)
    assert shards.splits == {"heldout": 3, "train": 17}
    assert torch.equal(shards.negative["prompt_embeds"], NEGATIVE["prompt_embeds"])
    assert sorted(p.name for p in directory.iterdir()) == [
        "index.json",
        "negative.safetensors",
        *(f"prompts-{i:06d}.tar" for i in range(3)),
    ]


def test_the_most_common_tags_of_a_split_are_counted(tmp_path: Path) -> None:
    tags = [("a",), ("b", "c"), ("b",), ("c",), ("b", "d"), (), ("c",)]
    every = [replace(record, tags=of, split="train") for record, of in zip(records(7), tags, strict=True)]
    other = [replace(records(8)[7], tags=("e",), split="heldout")]
    write_shards([*every, *other], tmp_path / "shards", negative=NEGATIVE, policy=STAMP, shard_size=3)
    shards = PromptShards(tmp_path / "shards")
    assert shards.common_tags("train", 3) == ["b", "c", "a"], "by number, then by name"
    assert shards.common_tags("train", 9) == ["b", "c", "a", "d"]
    assert shards.common_tags("heldout", 3) == ["e"]
    assert next(PromptStream(shards, "train", 0, 7)).tags != ()


def test_embeddings_are_zero_padded_to_the_text_length_and_stored_without_padding(tmp_path: Path) -> None:
    padded = torch.zeros(512, DIM, dtype=torch.bfloat16)
    padded[:3] = 1.5
    padded[1] = 0  # a zero row before the end is content
    record = PromptRecord(1, "x", conditioning={"prompt_embeds": padded, "pooled": torch.zeros(DIM)})
    stamp = EncoderStamp("wan", "0", 512)
    write_shards([record], tmp_path / "s", negative=record.conditioning, policy=stamp)
    read = PromptShards(tmp_path / "s").record(0).conditioning
    assert torch.equal(read["prompt_embeds"], padded)
    assert read["prompt_embeds"].dtype == torch.bfloat16
    assert torch.equal(read["pooled"], torch.zeros(DIM))
    assert os.path.getsize(tmp_path / "s" / "negative.safetensors") < padded.nbytes / 10


POOL = st.integers(0, 3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(POOL, st.none() | POOL), min_size=1, max_size=12), st.integers(1, 5))
def test_records_with_repeated_tensors_are_restored(chosen: list, shard_size: int) -> None:
    """Each shard stores each distinct tensor once."""
    pool = [{"prompt_embeds": embeds(number, 1 + number)} for number in range(4)]
    items = [
        PromptRecord(
            id=i,
            prompt=f"prompt {i}",
            negative_prompt=None if negative is None else f"negative {negative}",
            conditioning=pool[text],
            negative={} if negative is None else pool[negative],
        )
        for i, (text, negative) in enumerate(chosen)
    ]
    with TemporaryDirectory() as folder:
        write_shards(items, Path(folder, "s"), negative=NEGATIVE, policy=STAMP, shard_size=shard_size)
        found = list(PromptShards(Path(folder, "s")).records())
        for number, first in enumerate(range(0, len(chosen), shard_size)):
            numbers = {one for pair in chosen[first : first + shard_size] for one in pair if one is not None}
            with tarfile.open(Path(folder, "s", f"prompts-{number:06d}.tar")) as tar:
                assert sum(member.name.endswith("safetensors") for member in tar) == len(numbers)
    for (text, negative), record in zip(chosen, found, strict=True):
        away = NEGATIVE if negative is None else pool[negative]
        for expected, tensors in ((pool[text], record.conditioning), (away, record.negative)):
            rows = len(expected["prompt_embeds"])
            assert torch.equal(tensors["prompt_embeds"][:rows], expected["prompt_embeds"])
            assert not tensors["prompt_embeds"][rows:].any()


def test_a_reference_to_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """The second record of the shard refers to a tensor of the first record, which was removed."""
    twice = [PromptRecord(i, f"prompt {i}", conditioning=NEGATIVE) for i in range(2)]
    write_shards(twice, tmp_path / "s", negative=NEGATIVE, policy=STAMP)
    path = tmp_path / "s" / "prompts-000000.tar"
    with tarfile.open(path) as tar:
        second = tar.getmember("000000001.json")
    path.write_bytes(path.read_bytes()[second.offset :])
    with pytest.raises(ShardError, match="record 000000001: neither it nor an earlier record has its conditioning"):
        PromptShards(tmp_path / "s")


def test_folders_in_format_1_are_read(directory: Path) -> None:
    index = json.loads((directory / "index.json").read_text())
    del index["xxh3"]
    (directory / "index.json").write_text(json.dumps(index | {"format_version": 1}))
    shards = PromptShards(directory)
    assert all(record.negative_prompt is None for record in shards.records())
    assert torch.equal(shards.record(3).negative["prompt_embeds"], NEGATIVE["prompt_embeds"])


def test_two_builds_of_the_same_prompts_are_byte_identical(directory: Path, tmp_path: Path) -> None:
    write_shards(iter(records(20)), tmp_path / "again", negative=NEGATIVE, policy=STAMP, shard_size=7)
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("size", [1, 2, 3, 10, 31])
def test_any_window_of_the_endless_order_has_no_repeats(size: int) -> None:
    order = np.concatenate([epoch_order(size, 3, epoch) for epoch in range(40)])
    for epoch in range(40):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    width = window(size)
    for start in range(len(order) - width):
        assert len(set(order[start : start + width])) == width


def test_the_shuffle_is_uniform_and_depends_on_seed_and_epoch() -> None:
    orders = np.stack([epoch_order(8, seed, epoch) for seed in range(400) for epoch in (0, 1, 2)])
    counts = np.stack([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    expected = len(orders) / 8
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 7 / 8)
    assert len({tuple(order) for order in orders}) > 1000


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 12, 17])
def test_every_prompt_comes_once_per_epoch_and_never_twice_in_a_batch(directory: Path, batch_size: int) -> None:
    shards = PromptShards(directory)
    batches = list(islice(PromptStream(shards, "train", 7, batch_size), 3 * 17))
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    for epoch in range(len(ids) // 17):
        assert sorted(ids[epoch * 17 : (epoch + 1) * 17]) == list(range(1003, 1020))
    assert all(len(set(batch.ids.tolist())) == batch_size for batch in batches)


@pytest.mark.parametrize(("position", "batch_size"), [(0, 4), (12, 4), (17, 5), (40, 8), (123, 3), (26, 13)])
def test_seeking_to_a_position_equals_reading_up_to_it(directory: Path, position: int, batch_size: int) -> None:
    shards = PromptShards(directory)
    reader = PromptStream(shards, "train", 11, 1 if batch_size <= 8 else batch_size)
    while reader.position < position:
        next(reader)
    read_on = PromptStream(shards, "train", 11, batch_size, start=reader.position)
    whole = PromptStream(shards, "train", 11, batch_size, start=position % batch_size)
    while whole.position < position:
        next(whole)
    for one, two in islice(zip(read_on, whole, strict=False), 6):
        assert one.texts == two.texts
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.conditioning["prompt_embeds"], two.conditioning["prompt_embeds"])


def test_the_order_does_not_depend_on_the_batch_size(directory: Path) -> None:
    shards = PromptShards(directory)
    by_size = [
        torch.cat([batch.ids for batch in islice(PromptStream(shards, "train", 5, size), 120 // size)]).tolist()
        for size in (2, 3, 8)
    ]
    assert by_size[0] == by_size[1] == by_size[2]


def test_a_batch_larger_than_its_split_names_both_numbers(directory: Path) -> None:
    with pytest.raises(ShardError, match=r"batch of 4 prompts .* has 3"):
        PromptStream(PromptShards(directory), "heldout", 0, 4)
    with pytest.raises(ShardError, match=r"no split 'test'; it has \{'heldout': 3, 'train': 17\}.* --holdout"):
        PromptStream(PromptShards(directory), "test", 0, 1)


def test_errors_about_missing_files_name_the_remedy(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"nowhere do not exist; make them with bpgo-video prompts build"):
        PromptShards(tmp_path / "nowhere")
    (directory / "prompts-000001.tar").rename(tmp_path / "away")
    with pytest.raises(ShardError, match=r"prompts-000001.tar is missing"):
        PromptShards(directory)
    (directory / "index.json").unlink()
    with pytest.raises(
        ShardError, match=r"index.json is missing: the folder holds no prompt shards, or their build did not finish"
    ):
        PromptShards(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 99}, "format version 99"), ({"count": 0}, "0 prompts"), ({"shards": []}, "in 0 shards")],
)
def test_an_invalid_or_empty_index_is_refused(directory: Path, change: dict, message: str) -> None:
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(ShardError, match=message):
        PromptShards(directory)
    (directory / "index.json").write_text("{")
    with pytest.raises(ShardError, match="damaged"):
        PromptShards(directory)


def test_a_shard_truncated_anywhere_names_file_and_record(directory: Path) -> None:
    path = directory / "prompts-000001.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    content_end = members[-1].offset_data + members[-1].size
    for length in range(0, content_end - 1, 100):
        path.write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"prompts-000001.tar: record .* build the folder again") as caught:
            PromptShards(directory)
        last = sum(member.offset_data <= length for member in members) // 2  # pairs of readable headers
        named = re.search(r"record (\d+):", str(caught.value))
        assert (int(named[1]) - 6 if named else 0) in (last - 1, last, last + 1)


def test_a_damaged_byte_names_file_and_record(directory: Path) -> None:
    path = directory / "prompts-000001.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        tensors = tar.getmember("000000009.safetensors")
    data[tensors.offset_data + tensors.size - 1] ^= 1
    path.write_bytes(data)
    shards = PromptShards(directory)
    with pytest.raises(ShardError, match=r"prompts-000001.tar: record 000000009: its conditioning does not match"):
        shards.verify()
    with pytest.raises(ShardError, match="record 000000009"):
        list(islice(PromptStream(shards, "train", 0, 1), 17))
    data[tensors.offset + 150] ^= 255  # inside the header's checksum field
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"prompts-000001.tar: record 00000000[89]"):
        PromptShards(directory)


def test_a_changed_prompt_is_found_without_verifying(directory: Path) -> None:
    path = directory / "prompts-000002.tar"
    path.write_bytes(path.read_bytes().replace(b"prompt 15", b"prompt 51"))
    with pytest.raises(ShardError, match=r"prompts-000002.tar: record 000000015: .*its JSON is damaged"):
        PromptShards(directory)


def test_a_shard_with_other_bytes_than_the_index_states_fails_its_hash(directory: Path) -> None:
    PromptShards(directory).verify()
    path = directory / "prompts-000002.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # in the padding
    with pytest.raises(ShardError, match=r"prompts-000002.tar: its sha256"):
        PromptShards(directory).verify()


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("name", ["000000007.pyd", "000000007.pkl", "x.pth", "../evil.json", "a/b.json", "__m__.json"])
def test_a_member_of_another_type_is_refused_unread(directory: Path, name: str) -> None:
    payload = pickle.dumps(Bomb())
    with tarfile.open(directory / "prompts-000001.tar", "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(payload)
        tar.addfile(member, io.BytesIO(payload))
    with pytest.raises(ShardError, match=r"prompts-000001.tar: member .* is refused") as caught:
        PromptShards(directory)
    assert name in str(caught.value)


def test_a_symbolic_link_is_refused(directory: Path) -> None:
    with tarfile.open(directory / "prompts-000000.tar", "a") as tar:
        member = tarfile.TarInfo("link.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ShardError, match=r"'link.json' is refused"):
        PromptShards(directory)


def test_invalid_records_are_not_written(tmp_path: Path) -> None:
    def write(items):
        write_shards(items, tmp_path / "out", negative=NEGATIVE, policy=STAMP)

    with pytest.raises(ShardError, match="no prompts"):
        write([])
    with pytest.raises(ShardError, match=r"prompt 'x' .*\[7, 4\], 'dtype': 'float32'.* have .*\[6, 4\]"):
        write([PromptRecord(1, "x", conditioning={"prompt_embeds": torch.zeros(7, DIM)})])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["negative.safetensors"]


def test_a_duplicate_id_is_refused_when_the_folder_is_opened(tmp_path: Path) -> None:
    write_shards(records(2) + records(1), tmp_path / "out", negative=NEGATIVE, policy=STAMP)
    with pytest.raises(ShardError, match="several prompts have the id 1000"):
        PromptShards(tmp_path / "out")


def test_another_text_encoder_or_text_length_is_refused(directory: Path, tmp_path: Path) -> None:
    shards = PromptShards(directory)
    shards.check_policy(EncoderStamp("renamed", STAMP.fingerprint, TOKENS))
    with pytest.raises(ShardError, match=r"max_sequence_length 6, here 512.*build shards for .tiny."):
        shards.check_policy(EncoderStamp("tiny", STAMP.fingerprint, 512))
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(bytes(3 * 2**20))
    before = encoder_stamp(tmp_path, TOKENS)
    with pytest.raises(ShardError, match="other fingerprint"):
        shards.check_policy(before)
    with (tmp_path / "text_encoder" / "model.safetensors").open("r+b") as stream:
        stream.write(b"header")
    assert fingerprint(tmp_path, ("text_encoder", "tokenizer")) != before.fingerprint


def test_a_directory_keeps_only_its_table_in_memory(directory: Path) -> None:
    shards = PromptShards(directory)
    held = [value for value in vars(shards).values() if isinstance(value, np.ndarray)]
    assert [array.dtype.itemsize for array in held] == [66]  # ids and byte ranges, without texts and embeddings
    assert held[0].shape == (20,)


@pytest.mark.parametrize("name", ["prompts-000001.tar", "index.json", "negative.safetensors"])
def test_a_flipped_bit_is_found_or_changes_nothing(directory: Path, name: str) -> None:
    def content() -> list[tuple[Any, ...]]:
        shards = PromptShards(directory)
        return [
            (
                r.id,
                r.prompt,
                r.split,
                r.tags,
                r.info,
                *(t.tolist() for t in (*r.conditioning.values(), *r.negative.values())),
            )
            for r in shards.records()
        ]

    path, draws, before, found = directory / name, random.Random(name), content(), 0
    whole = path.read_bytes()
    for _ in range(100):
        changed = bytearray(whole)
        changed[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        path.write_bytes(changed)
        try:
            assert content() == before
        except ShardError:
            found += 1
    assert found > 20
