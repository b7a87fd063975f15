"""Parsing of prompt files in each format; every input error names its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpgo_video.data.prompt_files import Line, PromptFileError, Rejected, make_plan, prompt_id, read_lines


def read(path: Path, content: str | bytes) -> list[Line | Rejected]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_lines([path]))


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
    rows = b'prompt,id\none,1\ntwo\n\nlatin \xe9,3\nfour,4x\n"fi"ve,5\nsix,6\n'
    found = read(tmp_path / "p.csv", rows)
    assert [line.record.id for line in found if isinstance(line, Line)] == [1, 6]
    reasons = [line.reason for line in found if isinstance(line, Rejected)]
    for reason, expected in zip(
        reasons, ["1 cells, the first line 2", "0 cells", "not UTF-8", "'4x'", "expected after"], strict=True
    ):
        assert expected in reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "text\nhello\n", r"must name the columns.*not \['text'\]"),
        ("p.csv", "prompt,colour\nhello,red\n", r"must name the columns"),
        ("p.csv", "", r"must name the columns"),
        ("p.csv", '"prompt\n', r"unexpected end of data"),
        ("p.json", "{}", r"VBench's list"),
        ("p.json", "[", r"p.json: Expecting value"),
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
    lines = [{"negative_prompt": ""}, {"negative_prompt": " dark "}, {"negative_prompt": None},
             {"negative_prompt": "a\u0007b"}, {"negative_prompt": "x" * 2001}]  # fmt: skip
    found = read(tmp_path / "p.jsonl", "".join(json.dumps({"prompt": "x", **line}) + "\n" for line in lines))
    assert [line.record.negative_prompt for line in found if isinstance(line, Line)] == ["", "dark"]
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
