"""VBench suites: file names of videos, problems of a folder, and prompts that cannot be file names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bpgo_video.data.media import write_video
from bpgo_video.data.prompt_formats import PromptFileError
from bpgo_video.evaluation import vbench_files as vbench_suite
from bpgo_video.evaluation.vbench_files import (
    Suite,
    SuiteError,
    SuitePrompt,
    find_suite,
    image_path,
    listing,
    read_suite,
    video_problems,
)

ENTRIES = [
    {"prompt_en": "a dog, In the style of Ukiyo", "dimension": ["appearance_style"]},
    {
        "prompt_en": "the façade of Petra",
        "dimension": ["scene", "color"],
        "auxiliary_info": {"color": {"color": "red"}},
    },
    {"prompt_en": "a dog, In the style of Ukiyo", "dimension": ["temporal_style"]},
]


@pytest.fixture
def full_info(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(ENTRIES), "utf-8")
    return path


def test_files_are_named_by_the_prompt_verbatim(full_info: Path) -> None:
    suite = read_suite(str(full_info))
    assert list(suite.names())[:2] == ["a dog, In the style of Ukiyo-0.mp4", "a dog, In the style of Ukiyo-1.mp4"]
    assert len(suite.names()) == 2 * 5, "a prompt with two entries counts once"
    assert suite.dimensions == ("appearance_style", "temporal_style", "scene", "color")
    assert list(suite.names("scene")) == [f"the façade of Petra-{i}.mp4" for i in range(5)]
    assert len(suite.names("temporal_style")) == 5
    assert suite.prompts[1].info == {"auxiliary_info": {"color": {"color": "red"}}}


def test_plain_prompts_are_measured_in_every_dimension(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "a cat", "tags": ["animals"]}\n{"prompt": "a hat"}\n')
    suite = read_suite(str(tmp_path / "own.jsonl"), samples=2)
    assert list(suite.names("temporal_flickering")) == ["a cat-0.mp4", "a cat-1.mp4", "a hat-0.mp4", "a hat-1.mp4"]
    assert suite.dimensions == ()


def test_the_list_of_the_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vbench"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('importing downloads')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SuiteError, match=r"vbench_full_info|VBench_full_info"):
        find_suite("vbench")
    (package / "VBench_full_info.json").write_text(json.dumps(ENTRIES))
    assert find_suite("vbench") == package / "VBench_full_info.json"
    assert "vbench" not in sys.modules


def test_prompts_that_cannot_be_file_names_are_errors(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("black and/or white\na cat\n" + "long " * 50 + "\n")
    with pytest.raises(SuiteError) as caught:
        read_suite(str(tmp_path / "own.txt"))
    assert "'black and/or white' has a slash" in str(caught.value)
    assert "makes a name of 256 bytes; at most 237 fit" in str(caught.value)
    assert "a cat" not in str(caught.value)


def test_the_longest_accepted_name_can_be_written(tmp_path: Path) -> None:
    """A file is first written as `.{name}.partial-{8 digits}`."""
    longest = vbench_suite.LONGEST_NAME - len("-00.mp4")
    assert list(SuitePrompt("é" * (longest // 2)).problems) == []
    name = f"{'x' * longest}-00.mp4"
    (tmp_path / f".{name}.partial-01234567").write_text("")
    assert list(SuitePrompt("x" * longest).problems) == []
    assert len(list(SuitePrompt("x" * (longest + 1)).problems)) == 1


def test_whitespace_around_a_prompt_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"prompt_en": "a cat ", "dimension": ["color"]}]))
    with pytest.raises(SuiteError, match="'a cat '; remove it"):
        read_suite(str(tmp_path / "list.json"))


@pytest.mark.parametrize(("name", "text"), [("list.json", "[]"), ("list.json", "[{"), ("list.txt", "a cat\na cat\n")])
def test_unusable_lists_are_errors(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptFileError, match=name):
        read_suite(str(tmp_path / name))


def test_missing_and_unexpected_files_are_problems(full_info: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    with pytest.raises(SuiteError, match="no folder"):
        video_problems(folder, read_suite(str(full_info)))
    folder.mkdir()
    suite = read_suite(str(full_info), samples=1)
    for name in suite.names():
        write_video(folder / name, torch.zeros(2, 3, 16, 16), fps=8)
    assert video_problems(folder, suite) == []
    (folder / "the façade of Petra-0.mp4").unlink()
    (folder / "the fac\u0327ade of Petra-0.mp4").write_bytes(b"")  # the same letters in another Unicode normal form
    (folder / "A dog, in the style of ukiyo-0.mp4").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    hidden, cased, spelled, missing = video_problems(folder, suite)
    assert missing == "'the façade of Petra-0.mp4' is missing"
    assert "'.DS_Store' is none of the suite's files" in hidden
    assert "another spelling of 'a dog, In the style of Ukiyo-0.mp4'" in cased
    assert "another spelling of 'the façade of Petra-0.mp4'" in spelled


def test_images_are_found_by_the_list_or_by_the_prompt(tmp_path: Path) -> None:
    for name in ("a sea.jpg", "other.png"):
        (tmp_path / name).write_bytes(b"")
    assert image_path(SuitePrompt("a sea, camera pans left"), tmp_path) == tmp_path / "a sea.jpg"
    assert image_path(SuitePrompt("a sea", info={"image_name": "other.png"}), tmp_path) == tmp_path / "other.png"
    assert image_path(SuitePrompt("a sea", image=Path("own.png")), None) == Path("own.png")
    with pytest.raises(SuiteError, match="--images"):
        image_path(SuitePrompt("a sea"), None)
    with pytest.raises(SuiteError, match=r"a lake\.jpg, which does not exist"):
        image_path(SuitePrompt("a lake, camera static"), tmp_path)


def test_a_message_lists_some_problems_and_counts_the_rest() -> None:
    assert listing(map(str, range(22))).splitlines()[-2:] == ["  19", "  ... and 2 more"]
    assert "more" not in listing(map(str, range(20)))


def test_a_suite_has_samples_of_every_prompt() -> None:
    suite = Suite(Path("list"), (SuitePrompt("a"), SuitePrompt("b", ("color",))), samples=3)
    assert len(suite.names()) == 6
    assert list(suite.names("scene")) == ["a-0.mp4", "a-1.mp4", "a-2.mp4"]


def test_the_number_of_samples_is_that_of_the_layout(tmp_path: Path) -> None:
    """A flag counts more than the manifest next to the folder, and without both VBench's five are expected."""
    videos = tmp_path / "videos"
    assert vbench_suite.samples_of(videos, None) == 5
    manifest = tmp_path / "videos.generation.json"
    manifest.write_text('{"settings": {"samples_per_prompt": 2, "fps": 8}}')
    assert [vbench_suite.samples_of(videos, samples) for samples in (None, 3)] == [2, 3]
    manifest.write_text('{"settings": {}}')
    with pytest.raises(SuiteError, match=r"has no usable samples_per_prompt .*give it by --samples"):
        vbench_suite.samples_of(videos, None)
