"""Pages in a headless browser, and the problems on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip


@contextmanager
def started_browser() -> Iterator[Any]:
    """A browser; the test is skipped without playwright or Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page and the problems on it."""

    page: Any
    problems: list[str] = field(default_factory=list)

    def prompts(self) -> list[int]:
        """Rows of the visible cards, in their order."""
        rows = self.page.eval_on_selector_all(".pair:not([hidden])", "all => all.map(one => one.dataset.row)")
        return [int(row) for row in rows]

    def times(self, row: int) -> list[float]:
        return self.page.eval_on_selector_all(
            f".pair[data-row='{row}'] video", "all => all.map(one => one.currentTime)"
        )


@contextmanager
def visited(browser: Any, path: Path, **options: Any) -> Iterator[Visit]:
    """A page, opened in a context with these options; fails the test if the page had a problem or left its folder."""
    context = browser.new_context(**{"reduced_motion": "no-preference", **options})
    visit = Visit(context.new_page())
    visit.page.on("console", lambda message: visit.problems.append(f"{message.type}: {message.text}"))
    visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))
    visit.page.on("dialog", lambda dialog: (visit.problems.append(dialog.message), dialog.dismiss()))
    inside = re.compile(rf"data:|blob:|{re.escape(path.parent.as_uri())}/")
    visit.page.on("request", lambda request: inside.match(request.url) or visit.problems.append(request.url))
    visit.page.goto(path.as_uri())
    yield visit
    context.close()
    assert visit.problems == [], visit.problems
