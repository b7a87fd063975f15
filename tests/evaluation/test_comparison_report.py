"""The HTML report of a comparison in a browser: offline, synchronised playback, sorting, filters and accessibility."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video.data.media import VideoError, read_video, write_video
from bpgo_video.evaluation.compare_report import LONGEST_SIDE, chosen_rows, disagreement, embedded, write_report
from bpgo_video.evaluation.comparison import Compared, ModelScores, compare, video_path
from bpgo_video.training.summary import boxed
from tests.made import hostile_texts
from tests.made.browsing import Visit, started_browser, visited
from tests.made.synthetic_results import model_results, results

PROMPTS = 14
HOSTILE = """</script><img src=x onerror='alert(2)'>"&quot;`${alert(3)}`"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """A reference and two candidates; one of them has been trained, and its run has a log."""
    folder = tmp_path_factory.mktemp("comparison")
    run = folder / "runs" / "mine"
    run.mkdir(parents=True)
    lines = [{"step": step, "reward": 0.1 * step, "icc/alignment": 0.7, "heldout/oracle": 0.5} for step in range(9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return compare(
        [
            model_results(folder / "a", results("start", PROMPTS), 0.4),
            model_results(
                folder / "b", results("mine", PROMPTS, {"oracle": 1.0}, run=str(run), step=9, spread=0.5), 0.7
            ),
            model_results(folder / "c", results("other <i>", PROMPTS, {"second": -1.0}, spread=0.5), 1.0),
        ]
    )


@pytest.fixture(scope="module")
def report(models: Compared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report"), models, shown=PROMPTS)


def hostile_scores(scores: ModelScores, text: str = HOSTILE) -> ModelScores:
    """The scores with a text in every prompt, tag and the name of the first measure."""
    first = next(iter(scores.measures))

    def renamed(by_name: dict[str, Any]) -> dict[str, Any]:
        return {text if name == first else name: value for name, value in by_name.items()}

    lines = [
        replace(line, prompt=text + line.prompt, tags=[text], scores=renamed(line.scores)) for line in scores.prompts
    ]
    return replace(scores, prompts=lines, measures=renamed(scores.measures))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """The report, opened with the test's parameter as context."""
    with visited(browser, report, **getattr(request, "param", {})) as visit:
        yield visit


def test_the_page_is_self_contained_and_escapes_its_text(report: Path) -> None:
    source = report.read_text()
    assert "http:" not in source.replace("http-equiv", "")
    assert "https:" not in source
    for attribute in re.findall(r'\b(?:src|href|poster|data|srcset)="([^"]*)"', source):
        assert attribute.startswith(("data:", "#")), attribute[:60]
    assert "<i>" not in re.sub(r'<dd class="track"[^>]*><i ', "", source)
    assert "other &lt;i&gt;" in source
    assert "prompt 3 &lt;b&gt;&amp;" in source
    for title in ("mine is better than start:", "other &lt;i&gt; is worse than start:"):
        assert title in source


def test_hostile_names_run_no_script(browser: Any, tmp_path: Path) -> None:
    """Prompts, tags, labels and measures with markup and quotes; a dialog or an error of the page fails the test."""
    hostile = [
        hostile_scores(results(label, 4, spread=0.5)) for label in ('"><script>alert(1)</script>', "b' onload='x")
    ]
    compared = compare([model_results(tmp_path / name, model, 0.5) for name, model in zip("ab", hostile, strict=True)])
    with visited(browser, write_report(tmp_path, compared, shown=4)) as visit:
        assert visit.page.locator("script:not([type])").count() == 1
        assert visit.page.locator("h1").inner_text() == f"Comparison with {hostile[0].label}"
        assert HOSTILE in visit.page.locator(".prompt").first.inner_text()
        visit.page.get_by_role("combobox", name="Measure").select_option(HOSTILE)
        assert visit.page.locator(".pair .change").first.inner_text().startswith(HOSTILE)


@pytest.mark.parametrize("kind", hostile_texts.HOSTILE)
def test_hostile_results_run_no_script(kind: str, browser: Any, tmp_path: Path) -> None:
    """A text in every string of two models' results, and in the name of the run that one of them was trained in."""
    text = hostile_texts.HOSTILE[kind]
    run = tmp_path / text.replace("/", "|")[:60]
    run.mkdir()
    lines = [{"step": step, "reward": 0.1, f"icc/{text}": 0.7, f"heldout/{text}": 0.5} for step in range(9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text(json.dumps({"heldout_reward": text, "algorithm": text}))
    models = [results(f"{text} {letter}", 4, spread=0.5, run=str(run), step=9) for letter in "ab"]
    models = [
        replace(
            hostile_scores(model, text), source=text, starts_from=text,
            settings=model.settings | {"pipeline": text, text: text},
        )
        for model in models
    ]  # fmt: skip
    compared = compare([model_results(tmp_path / name, model, 0.5) for name, model in zip("ab", models, strict=True)])
    hostile_texts.check_page(browser, write_report(tmp_path, compared, shown=4))


def test_names_with_brackets_are_printed_as_they_are() -> None:
    """And not as styles, links or errors of the library that draws tables."""
    for name in ("[/]", "[bold]x", "[link=http://a]x[/link]"):
        assert boxed([[name, "1"]], (name, "measure"), title=name).count(name) == 3


def test_every_picture_control_and_table_has_a_name(visit: Visit) -> None:
    unnamed = visit.page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, video, svg, [role=region]")].filter((one) => {
            const label = one.ariaLabel || one.getAttribute("aria-labelledby") || (one.labels && one.labels.length);
            return !label && !(one.tagName === "BUTTON" && one.textContent.trim());
        }).map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert unnamed == []
    ids = visit.page.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    assert visit.page.locator("h1").count() == 1


def test_visible_videos_play_in_sync_and_others_are_not_loaded(visit: Visit) -> None:
    first, last = visit.prompts()[0], visit.prompts()[-1]
    visit.page.locator(f".pair[data-row='{first}']").scroll_into_view_if_needed()
    visit.page.wait_for_function(
        f"""() => [...document.querySelectorAll(".pair[data-row='{first}'] video")].every(
            (one) => one.videoWidth === 48 && one.currentTime > 0.2 && !one.error)"""
    )
    assert max(visit.times(first)) - min(visit.times(first)) < 0.3
    assert (
        visit.page.eval_on_selector_all(f".pair[data-row='{last}'] video", "all => all.map(one => one.src)") == [""] * 3
    )
    visit.page.get_by_role("button", name="Pause all").click()
    stopped = visit.times(first)
    visit.page.wait_for_timeout(200)
    assert visit.times(first) == stopped
    visit.page.locator(f".pair[data-row='{first}'] input").fill("0.5")
    visit.page.wait_for_function(f"() => document.querySelector(\".pair[data-row='{first}'] video\").currentTime > 0.5")
    assert visit.times(first) == pytest.approx([9 / 8 / 2] * 3, abs=0.02)


def test_cards_are_sorted_by_measure_and_model(visit: Visit, models: Compared) -> None:
    def gains(model: int, measure: str) -> list[float]:
        first, other = (models.models[place].table(measure).mean(axis=1) for place in (0, model))
        return (other - first).tolist()

    def sorted_by(values: list[float]) -> list[int]:
        return sorted(range(PROMPTS), key=lambda row: values[row])

    page = visit.page
    assert visit.prompts() == sorted_by(gains(1, "oracle"))[::-1]
    page.get_by_role("combobox", name="Sort by").select_option("biggest loss")
    assert visit.prompts() == sorted_by(gains(1, "oracle"))
    page.get_by_role("combobox", name="Measure").select_option("second")
    page.get_by_role("combobox", name="Compare with start").select_option("other <i>")
    assert visit.prompts() == sorted_by(gains(2, "second"))
    page.get_by_role("combobox", name="Sort by").select_option("disagreement between rewards")
    assert visit.prompts() == sorted_by(disagreement(models, models.models[2]).tolist())[::-1]
    page.get_by_role("combobox", name="Sort by").select_option("prompt order")
    assert visit.prompts() == list(range(PROMPTS))
    change = page.locator(".pair .change").first.inner_text()
    assert float(change.split()[1]) == pytest.approx(gains(2, "second")[0], abs=0.005)


def test_filters_and_keyboard_navigation_work(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("combobox", name="Tag").select_option("clear")
    assert sorted(visit.prompts()) == list(range(1, PROMPTS, 2))
    assert page.get_by_role("status").inner_text() == f"{PROMPTS // 2} of {PROMPTS} prompts shown"
    page.get_by_label("Prompt contains").fill("PROMPT 13")
    assert visit.prompts() == [13]
    page.get_by_role("button", name="Pause all").click()
    page.get_by_label("Prompt contains").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").startswith("Play the videos of: prompt 13")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector(\".pair[data-row='13'] video\").currentTime > 0.1")


@pytest.mark.parametrize("visit", [{"reduced_motion": "reduce"}], indirect=True)
def test_videos_do_not_start_if_the_user_prefers_reduced_motion(visit: Visit) -> None:
    visit.page.wait_for_timeout(300)
    assert visit.page.eval_on_selector_all("video", "all => all.every(one => one.paused)")
    assert visit.page.get_by_role("button", name="Play all").is_visible()


@pytest.mark.parametrize(
    "visit", [{"viewport": {"width": 390, "height": 800}, "color_scheme": scheme} for scheme in ("dark", "light")],
    indirect=True,
)  # fmt: skip
def test_a_phone_shows_the_page_without_horizontal_scrolling_in_its_colour_scheme(visit: Visit) -> None:
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
    background, ink = visit.page.evaluate(
        "(() => { const own = getComputedStyle(document.body); return [own.backgroundColor, own.color]; })()"
    )
    shades = [sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 765 for colour in (background, ink)]
    assert abs(shades[0] - shades[1]) > 0.7
    assert (shades[0] < 0.5) == visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.parametrize("visit", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_the_page_shows_pictures_and_an_explanation(visit: Visit) -> None:
    assert visit.page.get_by_text("each video shows its middle frame").is_visible()
    assert visit.page.locator("video[poster^='data:image/jpeg']").count() == 3 * PROMPTS
    assert not visit.page.locator("#tools").is_visible()


def test_the_extremes_of_the_candidates_are_shown_alternately(models: Compared) -> None:
    first, *others = models.models
    gains = [model.prompt_means("oracle") - first.prompt_means("oracle") for model in others]
    wins_and_losses = {int(row) for gain in gains for row in (gain.argmax(), gain.argmin())}
    apart = {int(disagreement(models, model).argmax()) for model in others}
    assert wins_and_losses | apart <= set(chosen_rows(models, 6))
    assert len(chosen_rows(models, 6)) == 6
    assert chosen_rows(models, 99) == list(range(PROMPTS))


def test_large_videos_are_downscaled_and_missing_videos_are_named(models: Compared, tmp_path: Path) -> None:
    model = model_results(tmp_path, results("large", 2))
    write_video(video_path(tmp_path, 0), torch.full((3, 3, 360, 642), 0.5), fps=12.0)
    clip = embedded(model, 0)
    assert (clip["width"], clip["height"]) == (LONGEST_SIDE, 180)
    (tmp_path / "embedded.mp4").write_bytes(base64.b64decode(clip["video"]))
    video, fps = read_video(tmp_path / "embedded.mp4")
    assert (tuple(video.shape), fps) == ((3, 3, 180, LONGEST_SIDE), 12.0)
    with pytest.raises(VideoError, match=r"is missing next to its scores; restore it"):
        embedded(model, 1)
    small = models.models[1]
    original = video_path(small.folder, 0).read_bytes()
    assert base64.b64decode(embedded(small, 0)["video"]) == original, "small videos are embedded unchanged"
