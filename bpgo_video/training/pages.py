"""How is a page of a report written? From a template of the package, as one file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bpgo_video.atomic import atomic_file
from bpgo_video.training.drawing import Curve


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template, in which text stays text, to `path`, complete or not at all; returns `path`.

    Args:
        template: its path within the package.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bpgo_video", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = _markup
    page = environment.get_template(template).render(**values)
    with atomic_file(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def _markup(curve: Curve) -> Markup:
    """Our own drawing: the one thing on a page that is markup and not text."""
    return Markup(curve.svg)
