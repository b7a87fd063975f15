"""YAML and JSON of users: what is no plain, finite, unambiguous data of a sane size is named, quickly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.deepspeed import read_ds_config
from bpgo_video.config.reading import config_from_dict, read_recipe
from bpgo_video.config.rules import check_name
from bpgo_video.documents import MalformedFile, plain_json, plain_yaml, read_text, to_yaml
from bpgo_video.errors import InputError
from tests.made.recipes import RECIPE

BOMB = "\n".join(["a: &a [x]", *(f"{name}: &{name} [{f'*{old}, ' * 9}]" for old, name in zip("abcdefg", "bcdefgh"))])  # noqa: B905


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"f has the key 'a' twice in one mapping, in lines 1 and 3; remove one"),
        ("a: {b: 1, b: 2}\n", r"the key 'b' twice in one mapping, in lines 1 and 1"),
        (BOMB, r"more than 100,000 values once its aliases"),
        ("&a [*a]\n", r"nested more than 64 levels deep"),
        ("[" * 100_000, r"nested more than 64 levels deep"),
        ("a: 1\n\tb: 2\n", r"f, line 2, is not YAML"),
        ("a: 1\0\n", r"f is not YAML: .*#x0000"),
        ("a: 2024-13-45\n", r"a number, date or tag"),
        ("a: 1" + "0" * 5000, r"a number, date or tag"),
        ("a: !!python/name:os.system\n", r"f, line 1, is not plain data"),
        ("a: !!bool maybe\n", r"a number, date or tag"),
    ],
)
def test_wrong_yaml_is_named(text: str, message: str) -> None:
    with pytest.raises(MalformedFile, match=message):
        plain_yaml(text, "f")


def test_a_number_in_scientific_notation_is_a_number_and_text_like_it_stays_text() -> None:
    assert plain_yaml("[1e-5, -2E+3, 1.0e-5, '1e-5', *a]".replace(", *a", ""), "f") == [1e-5, -2e3, 1e-5, "1e-5"]
    assert plain_yaml(to_yaml({"a": "1e-5", "b": 1e-5}), "f") == {"a": "1e-5", "b": 1e-5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', r"f is not JSON: the key 'a' appears twice in one object"),
        (b'{"a": NaN}', r"NaN is no JSON number"),
        (b'{"a": 1e999}', r"1e999 is too large"),
        (b"[" * 100_000, r"nested more than 64 levels deep"),
        (b"[" * 100 + b"]" * 100, r"nested more than 64 levels deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", r"f is not JSON"),
        (b'"\\ud800"', r"U\+D800, text that is not UTF-8"),
        (b"caf\xe9", r"f is not UTF-8 text: byte 4 is 0xe9; save it as UTF-8"),
        (b"", r"f is not JSON: it is empty"),
    ],
)
def test_wrong_json_is_named(text: bytes, message: str) -> None:
    with pytest.raises(MalformedFile, match=message):
        plain_json(text, "f")


def test_files_that_are_too_large_or_no_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(MalformedFile, match="more than 10 bytes"):
        read_text(tmp_path / "large", limit=10)
    with pytest.raises(MalformedFile, match="is a folder"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("zero3", r"content: it must be an object, \{\.\.\.\} \(given: 'zero3'\)"),
        ({"zero_optimization": {"stage": 7}}, r"stage is 7; it must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, r"zero_optimization\.stage: .*valid integer \(given: '3'\)"),
        ({"zero_optimization": [3]}, r"zero_optimization: it must be an object"),
        ({"zero_optimization": {"stage": 3}, "bf16": True}, r"bf16: it must be an object"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, r"offload_param\.device: .*'cpu'"),
    ],
)
def test_wrong_types_in_a_deepspeed_json_are_named(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_ds_config(str(tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("run", "num_steps", True, r"run\.num_steps: .*valid integer \(given: True\)"),
        ("run", "num_steps", "100", r"valid integer \(given: '100'\)"),
        ("optim", "learning_rate", float("inf"), r"finite number \(given: inf\)"),
        ("optim", "learning_rate", "1e-5", r"valid number \(given: '1e-5'\)"),
        ("rollout", "group_size", 10**9, r"less than or equal to 1048576 \(given: 1000000000\)"),
        ("rollout", "group_size", 10**6, r"more than the 1,048,576 that a step can have"),
        ("video", "num_frames", 10**6, r"such a micro-batch takes 393 GB"),
        ("run", "seed", 10**4000, r"less than 9223372036854775808 \(given: 1000"),
        ("policy", "gradient_checkpointing", "yes", r"valid boolean \(given: 'yes'\)"),
    ],
)
def test_wrong_kinds_and_impossible_sizes_are_named(section: str, key: str, value: object, message: str) -> None:
    tree = yaml.safe_load(RECIPE.read_text())
    tree.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tree)


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.read_text(), "utf-8-sig")
    assert read_recipe(tmp_path / "recipe.yaml") == read_recipe(RECIPE)


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, message in (
        ("file", "file is a file"),
        ("file/run", "file is a file"),
        ("link/run", "link is a link to nothing"),
        ("x" * 300, "a name of 300 bytes"),
        ("missing/" + "x" * 300, "a name of 300 bytes"),
        ("a\0b", "is no path"),
    ):
        with pytest.raises(InputError, match=message):
            check_name(tmp_path / name, "run.dir", "name another folder")
    check_name(tmp_path / "new" / "run", "run.dir", "")
