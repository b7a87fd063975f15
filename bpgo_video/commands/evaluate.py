"""Measure a policy.

    bpgo-video evaluate heldout --config tiny_wan_bpgo --policy runs/demo/export --output scores.json
    bpgo-video evaluate compare package:bpgo_video.tiny/weights/wan runs/demo --output runs/comparison --ranks 2
    bpgo-video evaluate compare base=runs/a/checkpoints/step-000050 runs/a runs/b --output runs/a-and-b --ranks 8

    bpgo-video evaluate layout --policy runs/demo --suite prompts.txt --samples 2 --output videos --seed 0 --ranks 2
    bpgo-video evaluate layout --check --suite prompts.txt --output videos
    bpgo-video evaluate score --videos videos --suite prompts.txt --dimensions temporal_flickering --output scores.json
    bpgo-video evaluate score --videos videos --dimensions dynamic_degree --output dynamics.json --ranks 2
    bpgo-video evaluate vbench --python VBENCH_PYTHON --videos videos --suite vbench --output results
    bpgo-video evaluate total results --json
    bpgo-video evaluate total scores.json dynamics.json --partial

heldout scores a policy folder on the recipe's held-out prompts with its `evaluation.rewards`: the same function,
prompts and noise as the evaluations within a training run. The standard error is over samples, with fixed prompts.

compare measures two models or more in the same way, on the same prompts and noise, and reports which is better: a
verdict in words, paired statistics in comparison.json, and report.html with the videos side by side
(docs/evaluation.md).

layout, score, vbench and total generate VBench's videos and compute its dimensions and totals.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from typing import Any

from bpgo_video.cli import Parser, add_ranks, device, help_of, positive, run_command, samples

Add = Callable[..., argparse.Action]

DIR: dict[str, Any] = {"type": Path, "metavar": "DIR"}
SET_BY_LAYOUT = ("policy", "prompts", "output", "seed", "samples_per_prompt", "fps", "split")
LAYOUT = """
Generate a suite's videos into DIR as {prompt}-{i}.mp4, on several ranks with --ranks or a launcher. The same command
continues an interrupted one; its exit code is 0 when every video exists and is complete."""
SCORE = """
Measure dimensions by VBench's formulas. Every result is labelled: exact (VBench's numbers, no network), native
(VBench's formula and network) or proxy. Without --suite every video of DIR is measured. Runs on several ranks with
--ranks or a launcher; the same command continues an interrupted one."""
VBENCH = """
Measure by VBench's own code: one process per dimension, with checked results and exit codes. On several ranks
(--ranks or a launcher), each takes its share of the dimensions."""
TOTAL = """
Compute the totals of VBench, VBench-I2V or VBench-2.0, depending on the dimensions. An incomplete set, or one with
proxies, is refused; --partial accepts it, and the result lists what is missing and what is a proxy."""
MODELS = (
    "two or more, the reference first: a diffusers pipeline, a run (its newest checkpoint), a checkpoint, or a folder "
    "of scores of an earlier comparison (OUTPUT/models/KEY); NAME=MODEL gives it a name"
)


def add_prompt_flags(add: Add) -> None:
    add("--split", help="split of the prompts (the recipe's evaluation.split)")
    add("--samples-per-prompt", type=positive, metavar="N", help="(the recipe's evaluation.samples_per_prompt)")
    add("--seed", type=int, metavar="S", help="of the noise (the recipe's run.seed)")


def add_suite_flags(add: Add, required: bool = False) -> None:
    kinds = "'vbench' (the list in the installed package), VBench's list (.json), or prompts (.txt, .jsonl, .csv)"
    add("--suite", required=required, help=kinds)
    add("--samples", type=samples, metavar="N", help="videos per prompt (those of the layout that made them, or 5)")


def add_video_flags(add: Add) -> None:
    add("--images", **DIR, help="VBench-I2V's images of one aspect ratio: data/crop/16-9")
    add("--fps", type=float, metavar="F", help="frame rate that every video must have")


def heldout_flags(add: Add) -> None:
    add("--config", type=Path, required=True, metavar="RECIPE", help="a training recipe, or the config.yaml of a run")
    add("--policy", metavar="FOLDER", help="diffusers pipeline, such as RUN/export (the recipe's policy.folder)")
    add_prompt_flags(add)
    add("--output", type=Path, metavar="FILE.json", help="settings, summary and every score; no file without it")


def compare_flags(add: Add) -> None:
    recipe = "prompts, video size, rewards and deployment settings (by default those of the first run)"
    add("models", nargs="+", metavar="MODEL", help=MODELS)
    add("--output", **DIR, required=True, help="for report.html, comparison.json, and models/ with scores")
    add("--config", type=Path, metavar="RECIPE", help=recipe)
    add_prompt_flags(add)
    add("--weights", choices=["raw", "ema"], default="raw", help="of checkpoints: the last ones or their average (raw)")
    add("--shown", type=positive, default=24, metavar="N", help="prompts with videos in the report (24)")


def layout_flags(add: Add) -> None:
    model = "a pipeline folder, a checkpoint, or a run for its newest one (required unless --check)"
    add("--policy", metavar="FOLDER|RUN", help=model)
    add("--output", **DIR, required=True, help="folder of the videos; the manifest is next to it")
    add("--seed", type=int, metavar="S", help="noise is a function of this, the prompt and i (required unless --check)")
    add("--generation-prompts", type=Path, metavar="FILE.jsonl", help="texts for the model in place of the prompts")
    add("--check", action="store_true", help="generate nothing: decode every video of DIR and report all problems")
    add_suite_flags(add, required=True)
    add_video_flags(add)


def score_flags(add: Add) -> None:
    add("--videos", **DIR, required=True)
    add("--dimensions", nargs="+", required=True, metavar="D")
    add("--output", type=Path, required=True, metavar="FILE.json", help="VBench's result format, with labels")
    kinds = "a network for a dimension: folder, hub id, short name (efficientnet, dis), or a factory, my_pkg.mod:build"
    add("--backbone", action="append", default=[], metavar="D=NETWORK", help=kinds)
    add("--head", type=Path, metavar="FILE", help="LAION's aesthetic head, sa_0_4_vit_l_14_linear.pth")
    add("--device", type=device, help="of torch (cuda if available; with several ranks each has its own)")
    add_suite_flags(add)
    add_video_flags(add)


def vbench_flags(add: Add) -> None:
    add("--python", required=True, metavar="PYTHON", help="a Python interpreter with the package vbench")
    add("--videos", **DIR, required=True)
    add("--output", **DIR, required=True, help="folder of the results; the same command continues an interrupted one")
    add("--dimensions", nargs="+", metavar="D", help="(every one of the suite)")
    add("--benchmark", choices=("vbench", "vbench-i2v"), default="vbench")
    add("--device", type=device, default="cuda", help="of torch: cuda (default), cuda:1 or cpu")
    add("--resolution", default="1-1", help="vbench-i2v: of the images, 1-1 (default), 8-5, 7-4 or 16-9")
    add("--folder", **DIR, default=Path(), help="vbench-i2v: the folder with vbench2_beta_i2v/data/crop (.)")
    add("--local", action="store_true", help="VBench's option: use only weights that are downloaded already")
    add_suite_flags(add)


def total_flags(add: Add) -> None:
    add("results", nargs="+", type=Path, metavar="FILE.json", help="result files, or folders of *_eval_results.json")
    add("--json", action="store_true", help="print JSON alone")
    add("--partial", action="store_true", help="accept an incomplete set, and label the result")
    add_suite_flags(add)


COMMANDS: dict[str, tuple[str, Callable[[Add], None], str, str]] = {  # name -> module, flags, summary, description
    "heldout": ("heldout", heldout_flags, "score a policy folder on a recipe's held-out prompts", ""),
    "layout": ("vbench_layout", layout_flags, "generate a suite under VBench's names, or check one", LAYOUT),
    "score": ("vbench_scoring", score_flags, "measure VBench's dimensions on a folder of videos", SCORE),
    "vbench": ("vbench_package", vbench_flags, "run VBench's own package, in its own interpreter", VBENCH),
    "total": ("vbench_files", total_flags, "VBench's totals of result files", TOTAL),
    "compare": ("compare", compare_flags, "which of several models is better, with statistics and a report", ""),
}


def run(args: argparse.Namespace) -> None:
    """Imports the command's module when it is called: it is heavy, and --help should be quick."""
    importlib.import_module(f"bpgo_video.evaluation.{COMMANDS[args.command][0]}").run(args)


def generation_flags() -> str:
    """The flags of a generation that `layout` accepts too, for its --help."""
    from bpgo_video.config.generation import GenerationSettings

    names = [field.name for field in fields(GenerationSettings) if field.name not in SET_BY_LAYOUT]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    intro = "The flags of bpgo-video generate apply, except --prompts and --samples-per-prompt, which the suite sets"
    return fill(f"{intro}: {flags}.", width=100, break_on_hyphens=False)


def parser(script: str | None = None) -> argparse.ArgumentParser:
    top = Parser(**help_of("evaluate", __doc__, script), formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, (_, add_flags, summary, description) in COMMANDS.items():
        command: Parser = commands.add_parser(
            name, help=summary, description=description or None, allow_abbrev=name != "layout"
        )
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        add_flags(command.add_argument)
        if name != "total":
            add_ranks(command)
        if name == "layout":
            command.more_help = generation_flags
            command.set_defaults(more=[])
    top.set_defaults(ranked="evaluate", run=run)
    return top


def main(words: Sequence[str], script: str | None = None) -> int:
    return run_command(parser(script), words)
