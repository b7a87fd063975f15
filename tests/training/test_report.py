"""The HTML report of a run: self-contained, with escaped text; malformed files are named."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from bpgo_video.data.media import VideoError, write_video
from bpgo_video.training.curves import PANELS, draw_curve, series, smoothed
from bpgo_video.training.metrics import MalformedFile
from bpgo_video.training.report import contact_sheet, frame_limits, main, write_report
from bpgo_video.training.summary import NOTHING

PROMPT = 'a red circle <script>alert("x")</script> & "moving" left'
SUMMARY = {
    "steps": 6,
    "algorithm": "bpgo",
    "heldout_reward": "oracle",
    "heldout_before": 0.5,
    "heldout_after": 0.65,
    "heldout_before_stderr": 0.02,
    "heldout_after_stderr": 0.018,
    "heldout_difference_stderr": 0.012,
    "heldout_interval": [0.1, 0.2],
    "heldout_measures": 5,
    "heldout_shown": 1,
    "heldout_prompts": 24,
    "videos_generated": 96,
    "seconds": {"total": 12.0, "rollout": 5.0, "reward": 1.0, "update": 6.0},
}


def record(step: int) -> dict[str, float]:
    values = {
        "step": step,
        "reward": 0.4 + 0.03 * step,
        "trust_mean": 1.0,
        "trust_min": 0.6,
        "trust_max": 1.4,
    }
    values |= {"ratio_mean": 1.001, "ratio_min": 0.9, "ratio_max": 1.1, "grad_norm": 0.5, "seconds": 2.0}
    values |= {f"trust/hist/{place:02d}": 0.5 * (place in (2, 7)) for place in range(10)}
    values |= {"icc/motion": 0.8}
    values |= {"seconds/rollout": 0.9, "seconds/reward": 0.1, "seconds/update": 0.8}
    return values | ({"heldout/oracle": 0.6, "heldout/oracle_stderr": 0.02} if step % 3 == 2 else {})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(record(step)) + "\n" for step in range(6))
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text("run:\n  dir: '<b>runs/demo</b>'\n")
    for i, side in enumerate(("before", "after")):
        (tmp_path / "samples" / side).mkdir(parents=True)
        write_video(tmp_path / "samples" / side / "000.mp4", torch.full((9, 3, 32, 32), 0.25 + 0.5 * i), fps=8.0)
    frames = {"<oracle>": {"times": [0.0, 0.125], "before": [0.1, 0.5], "after": [0.9, 0.3]}}
    sample = {"index": 0, "prompt": PROMPT, "seed": 7, "score_before": 0.31, "score_after": 0.78, "frames": frames}
    (tmp_path / "samples" / "samples.json").write_text(json.dumps([sample]))
    return tmp_path


@dataclass
class Page(HTMLParser):
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run_dir: Path) -> Page:
    page = Page()
    page.feed(write_report(run_dir).read_text())
    return page


def test_nothing_is_fetched_from_outside(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert "http:" not in (source := (run_dir / "report.html").read_text()).lower()
    assert "https:" not in source.lower()
    assert "@import" not in source
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    assert not page.all("script")
    assert not page.all("link")


def test_untrusted_text_is_escaped(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert PROMPT in page.text
    assert "<b>runs/demo</b>" in page.text
    assert all(PROMPT in (image["alt"] or "") for image in page.all("img"))


def test_every_curve_and_contact_sheet_is_present_and_described(run_dir: Path) -> None:
    page = page_of(run_dir)
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    assert [label.partition(":")[0] for label in labels] == [title for title, _, _ in PANELS.values()]
    assert "oracle from 0.5 to 0.6" in labels[0]  # starts at the summary's score before training
    sheets = [image["src"] or "" for image in page.all("img")]
    frames = [Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2]))) for sheet in sheets]
    greys = [frame.getpixel((5, 5))[0] / 255 for frame in frames]  # type: ignore[index]
    assert greys == pytest.approx([0.25, 0.75], abs=0.02)  # before training, then after
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_verdict_and_its_numbers_are_on_the_page(run_dir: Path) -> None:
    text = " ".join(page_of(run_dir).text.split())
    verdict = "Training helped: held-out oracle rose from 0.500 to 0.650, +0.150 [+0.100, +0.200] over 24 prompts"
    for words in (verdict, "+0.150 ± 0.012", "seed 7"):
        assert words in text
    assert "score 0.31 → 0.78 ▲ better" in text
    assert "1 score higher after training, 0 lower" in text


def test_the_diagnosis_is_on_the_page(run_dir: Path) -> None:
    assert NOTHING in page_of(run_dir).text
    lines = [json.dumps(record(step) | {"zero_std_share": 0.6}) + "\n" for step in range(6)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    assert "Zero-std groups: 60%" in page_of(run_dir).text


def test_the_histogram_of_the_trust_is_drawn_in_the_pages_colours() -> None:
    records = [record(step) for step in range(120)]
    curve = draw_curve("trust_histogram", records, {})
    assert curve is not None
    assert "50% of the groups at w = 1 or above" in curve.alt
    assert curve.svg.count("fill-opacity: 0.5") == 2 * 40, "two of ten bins, in columns of three steps"


def test_missing_parts_are_omitted(run_dir: Path) -> None:
    (run_dir / "samples" / "before" / "000.mp4").unlink()
    assert len(page_of(run_dir).all("img")) == 1
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"heldout_after": None, "steps": None}))
    assert "it is unknown whether training helped" in page_of(run_dir).text
    for name in ("summary.json", "config.yaml", "samples/samples.json"):
        (run_dir / name).unlink()
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
    page = page_of(run_dir)
    assert len(page.all("svg")) == 1
    assert "it is unknown whether training helped" in page.text
    (run_dir / "metrics.jsonl").write_text("")
    assert not page_of(run_dir).all("svg")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "{\n"),
        ("summary.json", '{"heldout_before": NaN}'),
        ("summary.json", '{"heldout_before": "high"}'),
        ("config.yaml", "a: [1\n"),
        ("samples/samples.json", '[{"prompt": "a"}]'),
        ("samples/after/000.mp4", "no video"),
    ],
)
def test_a_malformed_file_is_named(run_dir: Path, name: str, content: str) -> None:
    (run_dir / name).write_text(content)
    with pytest.raises((MalformedFile, VideoError), match=name.replace(".", r"\.")):
        write_report(run_dir)


def test_a_contact_sheet_has_evenly_spaced_frames_of_bounded_size() -> None:
    video = torch.linspace(0, 1, 17)[:, None, None, None].expand(17, 3, 320, 480)
    sheet = contact_sheet(video)
    assert sheet.startswith("data:image/jpeg")
    image = Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2])))
    assert image.size == (5 * 240 + 4 * 5, 160)
    centres = [image.getpixel((120 + 245 * i, 80))[0] / 255 for i in range(5)]  # type: ignore[index]
    assert centres == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.02)


def test_the_moving_mean_of_a_constant_is_constant_at_both_ends() -> None:
    assert smoothed([2.0] * 37).tolist() == pytest.approx([2.0] * 37)
    assert smoothed([1.0, 3.0]).tolist() == [1.0, 3.0]


def test_curves_count_finished_steps_and_are_reproducible() -> None:
    records = [record(step) for step in range(6)]
    assert series(records, "heldout/oracle") == ([3, 6], [0.6, 0.6])
    assert draw_curve("ratio", records, {}) == draw_curve("ratio", records, {})


def test_the_command_prints_the_path_and_names_a_wrong_folder(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "bpgo_video.training.report"]
    done = subprocess.run([*command, str(run_dir)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(run_dir / "report.html"))
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir / "samples")])
    with pytest.raises(SystemExit, match=r"error: .*samples is not a run directory"):
        main()


def test_a_strip_shows_the_score_of_each_frame(run_dir: Path) -> None:
    page = page_of(run_dir)
    labels = [tag["aria-label"] for tag in page.all("div") if tag.get("role") == "img"]
    assert labels == [
        "<oracle> by frame, before: 0.00 s 0.1, 0.12 s 0.5",
        "<oracle> by frame, after: 0.00 s 0.9, 0.12 s 0.3",
    ]
    shades = [tag["style"] for tag in page.all("i")]
    assert shades == [f"opacity: {0.08 + 0.92 * share:.2f}" for share in (0.0, 0.5, 1.0, 0.25)]


def test_shades_are_scaled_over_all_samples_of_a_reward() -> None:
    samples = [{"frames": frames} for frames in ({"a": {"times": [0.0], "after": [2.0]}}, {}, {"a": {"after": [4.0]}})]
    assert frame_limits(samples) == {"a": (2.0, 4.0)}


def test_the_held_out_score_is_plotted_against_the_training_reward() -> None:
    records = [record(step) for step in range(6)]
    assert draw_curve("trained_against_heldout", records, {}) is None
    records[5]["heldout/oracle"] = 0.4  # the score fell while the reward rose
    curve = draw_curve("trained_against_heldout", records, {"heldout_reward": "oracle"})
    assert curve is not None
    assert "held-out oracle from 0.6 to 0.4 while the training reward went from 0.46 to 0.55" in curve.alt
