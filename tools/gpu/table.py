"""The contents of gpu.json as the tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Figures = Mapping[str, Any]
Named = Mapping[str, Figures]  # results by the name of the measured object
LONGEST = 70  # characters of a cell
UNITS: dict[str, Callable[[Any], str]] = {  # by suffix of a result's name
    "_bytes": lambda value: f"{value / 1e9:.2f} GB",
    "_seconds": lambda value: f"{value:.3g} s",
    "_operations": lambda value: f"{value:.3g}",
    "_rate": lambda value: f"{value / 1e12:.3g} TFLOP/s",
}


def as_markdown(results: Mapping[str, Any]) -> str:
    """All results: the stages that ran, then a table for each stage."""
    stages = results["stages"]
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    ran = {name: {key: of[key] for key in ("seconds", "skipped") if key in of} for name, of in stages.items()}
    failed = {name: {"failure": "see gpu.json"} for name, of in stages.items() if "failure" in of}
    tables = [
        head(results["date"], stages.get("device", {}), results["command"], results["code"], packages),
        by_row("stage", {name: {**of, **failed.get(name, {})} for name, of in ran.items()}),
        by_row("check", scalars(stages.get("checks", {}))),
        by_column("a step of one sample", scalars(stages.get("small_model", {}))),
        by_column("by blocks", scalars(stages.get("large_model", {}))),
        *(by_row(f"attention, {size}", scalars(of)) for size, of in groups(stages.get("attention", {})).items()),
        by_row("blocks", scalars(stages.get("compiled", {}))),
        *(by_row(f"memory, {size}", scalars(of)) for size, of in groups(stages.get("memory_plan", {})).items()),
    ]
    return "\n\n".join(filter(None, tables)) + "\n"


def head(date: str, device: Figures, command: str, code: str, packages: str) -> str:
    name = device.get("name", device.get("platform", "no device yet"))
    rate = UNITS["_rate"](device["bf16_matrix_rate"]) if "bf16_matrix_rate" in device else "not measured"
    return f"{date}, {name}, `{command}`, {code}, {packages}. bf16 matrix products: {rate}."


def groups(stage: Figures) -> dict[str, Named]:
    """The entries of a stage that contain several named sets of results."""
    return {name: of for name, of in stage.items() if isinstance(of, dict) and any(map(is_group, of.values()))}


def is_group(value: Any) -> bool:
    return isinstance(value, dict)


def scalars(stage: Figures) -> dict[str, Figures]:
    """The scalar results of each entry; nested results are only in the JSON."""
    entries = {name: of for name, of in stage.items() if isinstance(of, dict)}
    return {
        name: {key: value for key, value in of.items() if not isinstance(value, dict | list)}
        for name, of in entries.items()
    }


def by_row(title: str, named: Named) -> str:
    """A row for each name, a column for each result."""
    keys = dict.fromkeys(key for of in named.values() for key in of)
    return markdown_table([title, *keys], [[name, *(cell(key, of) for key in keys)] for name, of in named.items()])


def by_column(title: str, named: Named) -> str:
    """A column for each name, a row for each result."""
    keys = dict.fromkeys(key for of in named.values() for key in of)
    return markdown_table([title, *named], [[key, *(cell(key, of) for of in named.values())] for key in keys])


def cell(key: str, figures: Figures) -> str:
    value = figures.get(key, "")
    if isinstance(value, bool | str):
        return str(value).splitlines()[0][:LONGEST].replace("|", "/") if str(value) else ""
    unit = next((unit for end, unit in UNITS.items() if key.endswith(end)), None)
    return unit(value) if unit else f"{value:.3g}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
