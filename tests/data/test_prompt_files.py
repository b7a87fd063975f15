"""Parsing of prompt files in each format; every input error names its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from bpgo_video.data.media import read_media
from bpgo_video.data.prompt_files import Line, Rejected, read_lines
from bpgo_video.data.prompt_formats import PromptFileError
from bpgo_video.data.prompt_plan import make_plan
from bpgo_video.data.records import prompt_id

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def read(path: Path, content: str | bytes, **reading) -> list[Line | Rejected]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_lines([path], **reading))


def test_csv_and_jsonl_are_equivalent(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    table = (
        'id,prompt,tags,split,image,negative_prompt\n7,"one, ""two""\nthree",x|y,heldout,a.png,"dark, blurry"\n'
        ",four,,,,\n"
    )
    objects = [
        {
            "id": 7,
            "prompt": 'one, "two"\nthree',
            "tags": ["x", "y"],
            "split": "heldout",
            "image": "a.png",
            "negative_prompt": "dark, blurry",
        },
        {"prompt": "four"},
    ]
    from_table = read(tmp_path / "p.csv", table)
    from_objects = read(tmp_path / "p.jsonl", "".join(json.dumps(line) + "\n" for line in objects))
    assert [line.record for line in from_table] == [line.record for line in from_objects]
    assert [line.record.negative_prompt for line in from_table] == ["dark, blurry", None]
    assert [line.media for line in from_table] == [{"image": tmp_path / "a.png"}, {}]
    assert [line.place for line in from_table] == [f"{tmp_path / 'p.csv'}:{number}" for number in (3, 4)]


def test_rows_after_an_invalid_row_are_read(tmp_path: Path) -> None:
    rows = b"prompt,id\none,1\ntwo\n\nlatin \xe9,3\nfour,4x\nsix,6\n"
    found = read(tmp_path / "p.csv", rows)
    assert [line.record.id for line in found if isinstance(line, Line)] == [1, 6]
    reasons = [line.reason for line in found if isinstance(line, Rejected)]
    for reason, expected in zip(reasons, ["another number of cells", "not UTF-8", "'4x'"], strict=True):
        assert expected in reason


ROWS = [{"caption": "a cat", "file_name": "one.png", "id": 5}, {"caption": "a dog", "file_name": "two.png", "id": 6}]


def save_list(folder: Path, suffix: str) -> str:
    table = pyarrow.Table.from_pylist(ROWS)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, folder / "metadata.parquet")
    elif suffix == ".jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        lines = [ROWS[0], *(row.values() for row in ROWS)]
        between = "," if suffix == ".csv" else "\t"
        (folder / f"metadata{suffix}").write_text("".join(between.join(map(str, line)) + "\n" for line in lines))
    return str(folder)


def data_set(folder: Path) -> datasets.Dataset:
    rows = [{"caption": row["caption"], "image": str(folder / row["file_name"]), "id": row["id"]} for row in ROWS]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def save_to_disk(folder: Path) -> str:
    data_set(folder).save_to_disk(folder / "saved")
    return str(folder / "saved")


def save_splits(folder: Path) -> str:
    datasets.DatasetDict(test=data_set(folder), train=data_set(folder).select([0])).save_to_disk(folder / "splits")
    return f"{folder / 'splits'}:test"


def save_parquet(folder: Path) -> str:
    datasets.load_from_disk(save_to_disk(folder)).to_parquet(folder / "hub" / "data.parquet")  # with the images
    return str(folder / "hub" / "data.parquet")


def as_on_the_hub(folder: Path) -> str:
    """A folder in the layout of a hub repository; the same call reads both."""
    save_parquet(folder)
    return f"{folder / 'hub'}:train"


SOURCES = {
    **{suffix: partial(save_list, suffix=suffix) for suffix in (".csv", ".tsv", ".jsonl", ".parquet")},
    **{save.__name__: save for save in (save_to_disk, save_splits, save_parquet, as_on_the_hub)},
}


@pytest.mark.parametrize("save", SOURCES.values(), ids=SOURCES)
def test_tables_folders_and_data_sets_give_the_same_prompts_and_images(
    save: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for row, picture in zip(ROWS, pictures, strict=True):
        picture.save(tmp_path / row["file_name"])
    lines = list(read_lines([save(tmp_path)]))
    assert [(line.record.prompt, line.record.id, line.record.split) for line in lines] == [
        ("a cat", 5, ""), ("a dog", 6, "")
    ]  # fmt: skip
    for line, row in zip(lines, ROWS, strict=True):
        assert read_media("image", line.media["image"]) == ("png", (tmp_path / row["file_name"]).read_bytes())


def test_a_data_set_names_no_files_outside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a set of the hub could put any image of this machine into shards that its user publishes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "private.png")
    (tmp_path / "set").mkdir()
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "set" / "own.png")
    paths = [str(tmp_path / "private.png"), "../private.png", str(tmp_path / "set" / ".." / "private.png"),
             str(tmp_path / "set" / "own.png"), "own.png"]  # fmt: skip
    plain = [{"caption": f"image {number}", "image": path} for number, path in enumerate(paths)]
    structs = [row | {"image": {"bytes": None, "path": row["image"]}} for row in plain]
    for rows in (plain, structs):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set", max_shard_size="1MB")
        *refused, own, relative = read_lines([tmp_path / "set"])
        assert all("leads out of the folder" in line.reason for line in refused)
        assert (own.media["image"], relative.media["image"]) == (tmp_path / "set" / "own.png",) * 2


def test_a_data_set_of_the_hub_names_only_files_that_came_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    copied = tmp_path / "hub" / "datasets--mine--set" / "snapshots" / "1" / "own.png"
    other = tmp_path / "hub" / "datasets--mine--private" / "snapshots" / "1" / "own.png"
    for path in (copied, other):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    rows = [{"caption": f"image {row}", "image": str(path)} for row, path in enumerate((copied, other))]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    own, refused = read_lines(["mine/set"])
    assert own.media["image"] == copied
    assert "leads out of the folder" in refused.reason


@pytest.mark.parametrize(("module", "name"), [("pyarrow.parquet", "metadata.parquet"), ("datasets", "owner/name")])
def test_a_missing_package_is_named(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_list(tmp_path, ".parquet")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PromptFileError, match=rf"{module}.*: pip install 'bpgo-video\[datasets\]'"):
        list(read_lines([tmp_path / name if "." in name else name]))


def test_columns_are_chosen_and_the_others_are_named(tmp_path: Path) -> None:
    content = "text,alt,pic,score\na cat,the cat,a.png,3\n"
    (tmp_path / "a.png").write_bytes(b"")
    (line,) = read(tmp_path / "p.csv", content)
    assert (line.record.prompt, line.media, line.unused) == ("a cat", {}, {"alt", "pic", "score"})
    (line,) = read(tmp_path / "p.csv", content, columns={"prompt": ["alt"], "image": ["pic"]})
    assert (line.record.prompt, line.media, line.unused) == (
        "the cat",
        {"image": tmp_path / "a.png"},
        {"text", "score"},
    )
    for columns, message in (
        (
            {"prompt": ["label"]},
            "named label; the columns are text, alt, pic, score: name one with --text-column",
        ),
        (
            {"image": ["image"]},
            "named image; the columns are text, alt, pic, score: name one with --image-column",
        ),
        ({"image": ["text"]}, "a cat does not exist"),
        ({"tags": ["score"], "info": ["score"]}, "'score' is '3', which is not of type dict"),
    ):
        (rejected,) = read(tmp_path / "p.csv", content, columns=columns)
        assert message in rejected.reason
    with pytest.raises(PromptFileError, match=r"no prompts in .*p.csv; the first line is refused: .*p.csv:2: no"):
        make_plan([tmp_path / "p.csv"], on_error="skip", columns={"prompt": ["label"]})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/nothing/here/at/all", r"does not exist; give a file, a folder, or a data set OWNER/NAME"),
        ("owner/name:train", r"owner/name:train cannot be read as a data set: "),  # offline
        ("{folder}/splits", r"its splits are test, train; name one, as in .*splits:train"),
        ("{folder}/splits:dev", r"splits:dev: its splits are test, train"),
        ("{folder}/p.parquet", r"p.parquet: .*not a parquet file"),
    ],
)
def test_sources_that_cannot_be_read_are_named(name: str, message: str, tmp_path: Path) -> None:
    for row in ROWS:
        Image.new("RGB", (4, 4)).save(tmp_path / row["file_name"])
    save_splits(tmp_path)
    (tmp_path / "p.parquet").write_bytes(b"hello, this is text")
    with pytest.raises(PromptFileError, match=message):
        list(read_lines([name.format(folder=tmp_path)]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", '"prompt\n', r"p.csv:1: unexpected end of data"),
        ("p.csv", 'prompt\none\n"tw"o\n', r"p.csv:3: .*expected after"),
        ("p.json", "{}", r"VBench's list"),
        ("p.json", "[", r"p.json is not JSON: Expecting value"),
    ],
)
def test_a_file_in_the_wrong_format_is_refused_entirely(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(PromptFileError, match=message):
        read(tmp_path / name, content)


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path: Path) -> None:
    for name in ("p.txt", "p.csv"):
        content = "\ufeffprompt\nhello\n"
        assert read(tmp_path / name, content)[-1].record.prompt == "hello"
        assert read(tmp_path / name, content)[0].record.id in (prompt_id("prompt"), prompt_id("hello"))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "p.jsonl", '{"prompt": "x", "split": ""}\n')
    assert isinstance(found, Rejected)
    assert found.reason == "the split is empty; remove it"


def test_a_negative_prompt_may_be_empty_and_must_be_usable(tmp_path: Path) -> None:
    lines = [{"negative_prompt": ""}, {"negative_prompt": " dark "}, {"negative_prompt": 3}, {"negative_prompt": None},
             {"negative_prompt": "a\u0007b"}, {"negative_prompt": "x" * 2001}]  # fmt: skip
    found = read(tmp_path / "p.jsonl", "".join(json.dumps({"prompt": "x", **line}) + "\n" for line in lines))
    assert [line.record.negative_prompt for line in found if isinstance(line, Line)] == ["", "dark", None]
    reasons = [line.reason for line in found if isinstance(line, Rejected)]
    for reason, expected in zip(
        reasons, ["not of type str", "control character", "negative prompt has 2001"], strict=True
    ):
        assert expected in reason


VBENCH = [
    {
        "prompt_en": "a person and a cup",
        "dimension": ["multiple_objects"],
        "auxiliary_info": {"multiple_objects": {"object": "a cup"}},
    },
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
    {"prompt_en": "a person and a cup", "dimension": ["subject_consistency"]},
    {"prompt_en": "a red car", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "car"}}},
    {"prompt_en": "a still frame"},
]


def test_vbench_dimensions_become_tags_and_equal_prompts_are_merged(tmp_path: Path) -> None:
    records = [line.record for line in read(tmp_path / "VBench_full_info.json", json.dumps(VBENCH))]
    assert [(record.prompt, record.tags) for record in records] == [
        ("a person and a cup", ("multiple_objects", "subject_consistency")),
        ("a red car", ("color", "object_class")),
        ("a still frame", ()),
    ]
    assert records[0].info == {"auxiliary_info": VBENCH[0]["auxiliary_info"]}
    assert records[1].info == {"auxiliary_info": {"color": "red", "object_class": {"object": "car"}}}
    assert records[2].info == {}


def test_contradictory_vbench_entries_are_rejected_together(tmp_path: Path) -> None:
    entries = [*VBENCH, {"prompt_en": "a red car", "auxiliary_info": {"color": "blue"}}, {"prompt": "x"}, 5]
    path = tmp_path / "p.json"
    rejected = [line for line in read(path, json.dumps(entries)) if isinstance(line, Rejected)]
    assert [line.place for line in rejected] == [f"{path}[{number}]" for number in (1, 6, 7)]
    assert "contradict each other: 'auxiliary_info' is" in rejected[0].reason
    plan = make_plan([path], on_error="skip")
    assert (plan.count, plan.rejected) == (2, 3)


def test_additional_fields_of_a_source_are_preserved(tmp_path: Path) -> None:
    (line,) = read(tmp_path / "p.jsonl", '{"prompt": "x", "info": {"seed": [1, 2]}}\n')
    assert line.record.info == {"seed": [1, 2]}


def test_the_prompt_files_of_other_projects_are_read_as_they_are(tmp_path: Path) -> None:
    """DanceGRPO's list and embedded captions, FastVideo's captions, and folders of flow_grpo and Flow-Factory."""
    listed = read(tmp_path / "video_prompts.txt", "A cat, cinematic -motion 2\r\nein Hund \u2014 4K\n")
    assert [line.record.prompt for line in listed] == ["A cat, cinematic -motion 2", "ein Hund \u2014 4K"]
    embedded = [{"prompt_embed_path": "0.pt", "prompt_attention_mask": "0.pt", "caption": "a cat"}]
    (line,) = read(tmp_path / "videos2caption.json", json.dumps(embedded))
    assert (line.record.prompt, line.unused) == ("a cat", {"prompt_embed_path", "prompt_attention_mask"})
    size = {"resolution": {"width": 848, "height": 480}, "fps": 30.0, "duration": 6.03}
    raw = [{"path": "1.mp4", **size, "cap": ["one caption", "another"]}, {"path": "2.mp4", **size, "cap": "a third"}, 5]
    found = read(tmp_path / "raw.json", json.dumps(raw))
    assert [one.record.prompt for one in found[:3]] == ["one caption", "another", "a third"]
    assert [one.place for one in found] == [f"{tmp_path / 'raw.json'}[{number}]" for number in (0, 0, 1, 2)]
    assert found[3].reason == "each entry must be an object"

    geneval, plain = tmp_path / "geneval", tmp_path / "ocr"
    geneval.mkdir()
    plain.mkdir()
    counted = {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "a photo of two benches"}
    (geneval / "train_metadata.jsonl").write_text(json.dumps(counted) + "\n")
    (geneval / "test_metadata.jsonl").write_text(json.dumps({**counted, "prompt": "a photo of a cat"}) + "\n")
    (plain / "train.txt").write_text('a sign that reads "open"\n')
    (plain / "test.txt").write_text('a sign that reads "closed"\n')
    for folder, tags in ((geneval, ("counting",)), (plain, ())):
        plan = make_plan([folder], holdout=0.5)
        assert [(line.record.split, line.record.tags) for line in plan.lines()] == [("train", tags), ("heldout", tags)]
        assert plan.has_splits
    (plain / "train.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(PromptFileError, match=r"holds train.txt and train.jsonl; give one file with --input"):
        make_plan([plain])
