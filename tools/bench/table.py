"""The benchmark's results as the tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIZES = ("frames", "group_size", "steps", "sequence")


def as_markdown(results: Mapping[str, Any]) -> str:
    """The contents of bench.json as markdown tables."""
    machine = results["machine"]
    sections = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, one thread a rank, `make bench`",
        _table(("ratio within this run", ""), _ratios(results)),
        _table(("one update, ZeRO-3, 2 ranks", "seconds"), [(k, f"{v:.3f}") for k, v in results["phases"].items()]),
        _table(("update relative to plain PyTorch, 2 ranks", ""), _updates(results)),
        _table(("step of the recipe with", "ranks", "seconds", "rollout", "reward", "update"), _scaling(results)),
    ]
    return "\n\n".join(sections) + "\n"


def _ratios(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    overlap = results["overlap"]
    scored = (
        f"rollout and reward / the longer of them, {overlap['chunks']} chunks, a reward that sleeps as long, 1 rank"
    )
    rows = [
        ("rollout, ZeRO-3 gathered / ZeRO-0, 2 ranks", results["zero3_gathered_over_zero0"]),
        ("rollout, ZeRO-3 sharded / ZeRO-0, 2 ranks", results["zero3_sharded_over_zero0"]),
        ("parameter memory of a rank, ZeRO-3 / ZeRO-0, 2 ranks", results["zero3_memory_over_zero0"]),
        ("what BPGO adds to a step over GRPO, 2 ranks", results["learner_over_step"]),
        (f"{scored}, scored inline", overlap["inline"]["over_longer"]),
        (f"{scored}, scored concurrently (at most {overlap['bound']:.3f})", overlap["beside"]["over_longer"]),
        *(
            (f"rollout with log-probs, decoded / diffusers' WanPipeline, {name}, 1 rank", case["ratio"])
            for name, case in results["against_diffusers"].items()
        ),
        ("decoding / diffusers' AutoencoderKLWan, 1 rank", results["decoding_over_diffusers"]),
    ]
    return [(name, f"{ratio:.3f}") for name, ratio in rows]


def _updates(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{ratio:.3f}") for name, ratio in results["updates"]["over_plain"].items()]


def _scaling(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for row in results["scaling"]:
        name = next(size for size in SIZES if size in row)
        times = [row["seconds"], *(row[f"seconds/{phase}"] for phase in ("rollout", "reward", "update"))]
        rows.append((f"{name} {row[name]}", str(row["ranks"]), *(f"{value:.2f}" for value in times)))
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
