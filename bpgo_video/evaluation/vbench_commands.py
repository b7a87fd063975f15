"""VBench in `bpgo-video evaluate`: the subcommands layout, score, vbench and total."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from typing import Any

from bpgo_video.cli import Parser, add_ranks, device, positive

Add = Callable[..., argparse.Action]

DIR: dict[str, Any] = {"type": Path, "metavar": "DIR"}
SET_BY_LAYOUT = ("policy", "prompts", "output", "seed", "samples_per_prompt", "fps", "split")
LAYOUT = """
Generate a suite into DIR as {prompt}-{i}.mp4, on several ranks with --ranks or a launcher. The same command
continues an interrupted one; its exit code is 0 when every video is there and complete."""
SCORE = """
Measure dimensions by VBench's formulas. Every result is labelled: exact (VBench's numbers, no network), native
(VBench's formula and network) or proxy. Without --suite every video of DIR is measured. On several ranks with
--ranks or a launcher; the same command continues an interrupted one."""
VBENCH = """
Measure by VBench's own code: one process a dimension, checked results, real exit codes. On several ranks
(--ranks, or a launcher) each takes its share of the dimensions."""
TOTAL = """
Totals of VBench, VBench-I2V or VBench-2.0, whichever has the dimensions. An incomplete set, or one with proxies,
is refused; --partial takes it, and says in the result what is missing and what is a proxy."""


def add_vbench_commands(commands: Any) -> None:
    """Adds the subcommands to what `add_subparsers` returned."""
    layout = add(commands, "layout", "layout", "generate a suite under VBench's names, or check one", LAYOUT)
    layout_flags(layout.add_argument)
    layout.more_help = generation_flags
    layout.set_defaults(more=[])
    score = add(commands, "score", "scoring", "measure VBench's dimensions on a folder of videos", SCORE)
    score_flags(score.add_argument)
    vbench = add(commands, "vbench", "package", "run VBench's own package, in its own interpreter", VBENCH)
    vbench_flags(vbench.add_argument)
    total = add(commands, "total", "totals", "VBench's totals of result files", TOTAL)
    total_flags(total.add_argument)


def add(commands: Any, name: str, module: str, summary: str, description: str) -> Parser:
    """A subcommand that calls `run` of a module, which is imported then: it is heavy, and --help should be quick."""

    def run(args: argparse.Namespace) -> None:
        importlib.import_module(f"bpgo_video.evaluation.vbench.{module}").run(args)

    command: Parser = commands.add_parser(name, help=summary, description=description, allow_abbrev=name != "layout")
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    if name != "total":
        add_ranks(command)
    command.set_defaults(run=run)
    return command


def suite_flags(add: Add, required: bool = False) -> None:
    kinds = "'vbench' (the list in the installed package), VBench's list (.json), or prompts (.txt, .jsonl, .csv)"
    add("--suite", required=required, help=kinds)
    add("--samples", type=positive, default=5, metavar="N", help="videos of each prompt (5)")


def video_flags(add: Add) -> None:
    add("--images", **DIR, help="VBench-I2V's images of one aspect ratio: data/crop/16-9")
    add("--fps", type=float, metavar="F", help="frames a second that every video has")


def layout_flags(add: Add) -> None:
    model = "a pipeline folder, a checkpoint, or a run for its newest one (required unless --check)"
    add("--policy", metavar="FOLDER|RUN", help=model)
    add("--output", **DIR, required=True, help="folder of the videos; the manifest is next to it")
    add("--seed", type=int, metavar="S", help="noise is a function of this, the prompt and i (required unless --check)")
    add("--generation-prompts", type=Path, metavar="FILE.jsonl", help="what the model receives instead of each prompt")
    add("--check", action="store_true", help="generate nothing: decode every video of DIR and report what is wrong")
    suite_flags(add, required=True)
    video_flags(add)


def generation_flags() -> str:
    """The flags of a generation that `layout` takes too, for its --help."""
    from bpgo_video.inference.settings import GenerationSettings  # heavy

    names = [field.name for field in fields(GenerationSettings) if field.name not in SET_BY_LAYOUT]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    intro = "The flags of bpgo-video generate apply, except --prompts and --samples-per-prompt, the suite's"
    return fill(f"{intro}: {flags}.", width=100, break_on_hyphens=False)


def score_flags(add: Add) -> None:
    add("--videos", **DIR, required=True)
    add("--dimensions", nargs="+", required=True, metavar="D")
    add("--output", type=Path, required=True, metavar="FILE.json", help="VBench's result format, with labels")
    kinds = "a network for a dimension: folder, hub id, short name (efficientnet, dis), or a factory, my_pkg.mod:build"
    add("--backbone", action="append", default=[], metavar="D=NETWORK", help=kinds)
    add("--head", type=Path, metavar="FILE", help="LAION's aesthetic head, sa_0_4_vit_l_14_linear.pth")
    add("--device", type=device, help="of torch (cuda if there is one; of several ranks each its own)")
    suite_flags(add)
    video_flags(add)


def vbench_flags(add: Add) -> None:
    add("--python", required=True, metavar="PYTHON", help="an interpreter with the package vbench")
    add("--videos", **DIR, required=True)
    add("--output", **DIR, required=True, help="folder of the results; an interrupted command continues")
    add("--dimensions", nargs="+", metavar="D", help="(every one of the suite)")
    add("--benchmark", choices=("vbench", "vbench-i2v"), default="vbench")
    add("--device", type=device, default="cuda", help="of torch: cuda (default), cuda:1 or cpu")
    add("--resolution", default="1-1", help="vbench-i2v: of the images, 1-1 (default), 8-5, 7-4 or 16-9")
    add("--folder", **DIR, default=Path(), help="vbench-i2v: where vbench2_beta_i2v/data/crop is (.)")
    add("--local", action="store_true", help="VBench's option: only weights that are downloaded already")
    suite_flags(add)


def total_flags(add: Add) -> None:
    add("results", nargs="+", type=Path, metavar="FILE.json", help="result files, or folders of *_eval_results.json")
    add("--json", action="store_true", help="print JSON alone")
    add("--partial", action="store_true", help="take what is there, and label it")
    suite_flags(add)
