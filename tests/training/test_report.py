"""The HTML report of a run: self-contained, with escaped text; malformed files are named."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from bpgo_video.data.media import VideoError, write_video
from bpgo_video.documents import MalformedFile
from bpgo_video.training.curves import PANELS, draw_curve, series, smoothed
from bpgo_video.training.report import LiveReport, contact_sheet, frame_limits, main, write_report
from bpgo_video.training.summary import NOTHING
from tests.made.browsing import started_browser, visited
from tests.made.hostile_texts import HOSTILE, check_page

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
    "heldout_detectable": 0.0412,
    "world_size": 2,
    "environment": {
        "code": ["bpgo_video 0.1.0, commit 6f1c"],
        "packages": {"python": "3.12.3", "torch": "2.13.0"},
        "hardware": "2 x NVIDIA H200 on 1 host",
        "device": "cuda",
    },
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
    values |= {"icc/motion": 0.8, "trust_validity/motion+truth": 0.3, "trust_kind/clear": 1.2, "trust_kind/open": 0.9}
    values |= {"seconds/rollout": 0.9, "seconds/reward": 0.1, "seconds/update": 0.8}
    return values | (
        {"heldout/oracle": 0.6, "heldout/oracle_stderr": 0.02, "look/clipped": 0.1} if step % 3 == 2 else {}
    )


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
    """Only videos of the run are, by relative paths; the only script is the page's own, which its policy names."""
    page = page_of(run_dir)
    source = (run_dir / "report.html").read_text()
    assert "http:" not in source.lower()
    assert "https:" not in source.lower()
    assert "@import" not in source
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("data:", "#", "samples/"))
    assert [video["src"] for video in page.all("video")] == ["samples/before/000.mp4", "samples/after/000.mp4"]
    (policy,) = (tag["content"] or "" for tag in page.all("meta") if tag.get("http-equiv"))
    script = source[source.index("<script>") + len("<script>") : source.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert len(page.all("script")) == 1
    assert f"script-src 'sha256-{digest}'" in policy
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


def test_kinds_of_prompts_have_a_line_each_also_if_steps_lack_some() -> None:
    records = [{"step": step, "trust_kind/clear": 1.25} for step in range(2)]
    records += [{"step": step, "trust_kind/clear": 1.25, "trust_kind/open": 0.5} for step in range(2, 4)]
    curve = draw_curve("trust_kinds", records, {})
    assert curve is not None
    assert curve.alt == "clear from 1.25 to 1.25; open from 0.5 to 0.5"
    assert draw_curve("trust_kinds", [{"step": 0, "reward": 1.0}], {}) is None


def test_the_verdict_and_its_numbers_are_on_the_page(run_dir: Path) -> None:
    text = " ".join(page_of(run_dir).text.split())
    verdict = "held-out oracle rose from 0.500 to 0.650, +0.150 [+0.100, +0.200] over 24 prompts"
    power = "24 prompts can show a difference of 0.041 (with 80% power)"
    for words in ("▲ Training helped:", verdict, "+0.150 ± 0.012", "[+0.100, +0.200]", power, "seed 7"):
        assert words in text
    assert "score 0.31 → 0.78 ▲ higher" in text
    assert "1 score higher after training, 0 lower" in text


def test_code_hardware_and_cost_are_on_the_page(run_dir: Path) -> None:
    """12 seconds on 2 GPUs are .0067 hours; 96 videos take .125 s each; every step took 2 s."""
    text = " ".join(page_of(run_dir).text.split())
    where = ("commit 6f1c", "python 3.12.3, torch 2.13.0", "2 x NVIDIA H200 on 1 host", "2 ranks")
    cost = ("0.01 GPU-hours: 2 x 12 s", "seconds per video, all included0.125", "seconds per step, median2")
    for words in where + cost:
        assert words in text


def test_only_a_tested_difference_is_coloured(run_dir: Path) -> None:
    """A single video's score may fall; red and green are for the verdict."""
    for shown, colour in ((1, "rose"), (-1, "fell"), (0, "")):
        (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"heldout_shown": shown}))
        classes = [tag.get("class") or "" for _, tag in page_of(run_dir).tags]
        assert [name for one in classes for name in one.split() if name in ("rose", "fell")] == [colour] * bool(colour)


def test_the_report_of_an_unfinished_run_is_written_now_and_then(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reloads itself and says how far the run is; the finished one does not. A failure does not stop the run."""
    so_far = SUMMARY | {"steps": 6, "num_steps": 100}
    live = LiveReport(run_dir)
    live.update(lambda: so_far)
    assert not (run_dir / "report.html").exists(), "the first one is due after a minute"
    live.due = 0.0
    live.update(lambda: so_far)
    source = (run_dir / "report.html").read_text()
    assert 'data-reload="30"' in source
    assert "step 6 of 100" in source
    assert live.due - time.monotonic() > 50
    assert "data-reload" not in write_report(run_dir).read_text()
    (run_dir / "samples" / "samples.json").write_text("[")
    live.due = 0.0
    live.update(lambda: so_far)
    assert "the report of the unfinished run was not written" in capsys.readouterr().err


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


def test_the_command_prints_the_path_and_names_a_wrong_folder(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "bpgo_video.training.report"]
    done = subprocess.run([*command, str(run_dir)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(run_dir / "report.html"))
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir / "samples")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "samples is not a run directory" in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_browser() as browser:
        yield browser


def hostile_run(folder: Path, text: str) -> Path:
    """A run with a text in the name of its folder and in every string of its files, names of metrics included."""
    run_dir = folder / text.replace("/", "|")[:60]
    shutil.copytree(folder / "run", run_dir)
    keys = ("heldout/", "heldout_ema/", "icc/", "trust_validity/", "reward/", "ras/", "seconds/", "trust/", "")
    records = [record(step) | {f"{key}{text}": 0.5 for key in keys} for step in range(6)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    environment = {"code": [text], "packages": {text: text}, "hardware": text, "device": text}
    summary = SUMMARY | {"algorithm": text, "heldout_reward": text, "environment": environment}
    (run_dir / "summary.json").write_text(json.dumps(summary | {"seconds": {text: 1.0, "total": 12.0}}))
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"run": {text: text}}, allow_unicode=True))
    frames = {text: {"times": [0.0, 0.125], "before": [0.1, 0.5], "after": [0.9, 0.3]}}
    (sample,) = json.loads((run_dir / "samples" / "samples.json").read_text())
    (run_dir / "samples" / "samples.json").write_text(json.dumps([sample | {"prompt": text, "frames": frames}]))
    return run_dir


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_run_runs_no_script_in_its_report(kind: str, browser: Any, run_dir: Path) -> None:
    shutil.copytree(run_dir, run_dir / "run")
    check_page(browser, write_report(hostile_run(run_dir, HOSTILE[kind])))


def test_a_sample_names_no_video_outside_the_run(run_dir: Path) -> None:
    """The report embeds its frames."""
    write_video(run_dir / "private" / "000.mp4", torch.zeros(9, 3, 32, 32), fps=8.0)
    (sample,) = json.loads((run_dir / "samples" / "samples.json").read_text())
    for after in ("../private", str(run_dir / "private"), "..", "a/../../private"):
        (run_dir / "samples" / "samples.json").write_text(json.dumps([sample | {"after": after}]))
        with pytest.raises(MalformedFile, match=r"samples\.json: 0\.after"):
            write_report(run_dir)


def test_the_videos_of_a_sample_play_together(browser: Any, run_dir: Path) -> None:
    """They are files next to the page; PROMPT runs no script, or the visit fails."""
    with visited(browser, write_report(run_dir)) as visit:
        assert visit.page.locator(".prompt").inner_text() == PROMPT
        visit.page.get_by_role("button", name="Play all").click()
        visit.page.wait_for_function(
            "() => [...document.querySelectorAll('video')].every((one) => one.currentTime > 0.2)"
        )
        visit.page.get_by_role("button", name="Pause all").click()
        times = visit.page.eval_on_selector_all("video", "all => all.map((one) => one.currentTime)")
        assert len(times) == 2
        assert max(times) - min(times) < 0.3
        assert visit.page.eval_on_selector_all("video", "all => all.every((one) => one.paused && !one.controls)")


def test_the_page_of_an_unfinished_run_shows_what_was_written_since(
    browser: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpgo_video.training.report.RELOAD", 1)
    page = write_report(run_dir, SUMMARY | {"steps": 6, "num_steps": 9})
    with visited(browser, page) as visit:
        visit.page.get_by_text("step 6 of 9").wait_for()
        write_report(run_dir, SUMMARY | {"steps": 7, "num_steps": 9})
        visit.page.get_by_text("step 7 of 9").wait_for(timeout=10_000)
        write_report(run_dir)
        visit.page.get_by_text("This run is not finished").wait_for(state="detached", timeout=10_000)


@pytest.mark.parametrize("options", [{"color_scheme": scheme} for scheme in ("dark", "light")], ids=str)
def test_a_phone_shows_the_report_without_horizontal_scrolling(browser: Any, run_dir: Path, options: Any) -> None:
    with visited(browser, write_report(run_dir), viewport={"width": 390, "height": 800}, **options) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
        for summary in visit.page.locator("summary").all():
            summary.click()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 390


def test_long_curves_are_drawn_with_a_bounded_number_of_points() -> None:
    """Of 5,000 steps every five become one: means, or extremes, at the last one's step."""
    records = [{"step": step, "a": step % 5, "b_min": step % 5, "b_max": step % 5} for step in range(5000)]
    steps, means = series(records, "a")
    assert (len(steps), steps[:2], set(means)) == (1000, [5, 10], {2})
    assert [set(series(records, key)[1]) for key in ("b_min", "b_max")] == [{0}, {4}]


def test_the_held_out_score_is_plotted_against_the_training_reward() -> None:
    records = [record(step) for step in range(6)]
    assert draw_curve("trained_against_heldout", records, {}) is None
    records[5]["heldout/oracle"] = 0.4  # the score fell while the reward rose
    curve = draw_curve("trained_against_heldout", records, {"heldout_reward": "oracle"})
    assert curve is not None
    assert "held-out oracle from 0.6 to 0.4 while the training reward went from 0.46 to 0.55" in curve.alt
