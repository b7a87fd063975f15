"""VBench in `bpgo-video evaluate`: the subcommands layout, score, vbench and total."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from bpgo_video.cli import Parser, add_ranks, device, positive, show_loading_once

if TYPE_CHECKING:  # heavy, and --help needs neither
    import torch

    from bpgo_video.parallel.mesh import Mesh

OWN = (
    "policy",
    "prompts",
    "output",
    "seed",
    "samples_per_prompt",
    "fps",
    "split",
)  # said by layout's flags, or a suite's


def add_vbench_commands(commands: Any) -> None:
    """Add the subcommands to what `add_subparsers` returned."""
    add_layout(
        commands.add_parser("layout", help="generate a suite under VBench's names, or check one", allow_abbrev=False)
    )
    add_score(commands.add_parser("score", help="measure VBench's dimensions on a folder of videos"))
    add_vbench(commands.add_parser("vbench", help="run VBench's own package, in its own interpreter"))
    add_total(commands.add_parser("total", help="VBench's totals of result files"))


def add_suite(command: argparse.ArgumentParser, required: bool = False) -> None:
    kinds = "'vbench' (the list in the installed package), VBench's list (.json), or prompts (.txt, .jsonl, .csv)"
    command.add_argument("--suite", required=required, help=kinds)
    command.add_argument("--samples", type=positive, default=5, metavar="N", help="videos of each prompt (5)")


def add_videos(command: argparse.ArgumentParser) -> None:
    """What describes the videos beside the suite."""
    command.add_argument("--images", type=Path, metavar="DIR", help="VBench-I2V's images of one shape: data/crop/16-9")
    command.add_argument("--fps", type=float, metavar="F", help="frames a second that every video has")


def add_layout(command: Parser) -> None:
    add, command.more_help = command.add_argument, generation_flags
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.description = (
        "Generate a suite into DIR as {prompt}-{i}.mp4, on several ranks with --ranks or a launcher. The same command\n"
        "continues where it was interrupted; its exit code is 0 when every video is there and whole."
    )
    model = "a pipeline folder, a checkpoint, or a run for its newest one (required unless --check)"
    add("--policy", metavar="FOLDER|RUN", help=model)
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the videos; the manifest lies beside it")
    add("--seed", type=int, metavar="S", help="noise is a function of this, the prompt and i (required unless --check)")
    add("--generation-prompts", type=Path, metavar="FILE.jsonl", help="what the model is told in place of each prompt")
    add("--check", action="store_true", help="make nothing: decode every video of DIR and name what is wrong with it")
    add_suite(command, required=True)
    add_videos(command)
    add_ranks(command)
    command.set_defaults(run=layout, more=[])


def generation_flags() -> str:
    """What `layout` takes beside its own flags."""
    from bpgo_video.generation.settings import GenerationSettings

    flags = [f"--{field.name.replace('_', '-')}" for field in fields(GenerationSettings) if field.name not in OWN]
    told = "The flags of bpgo-video generate hold, but for --prompts and --samples-per-prompt, the suite's"
    return fill(f"{told}: {', '.join(flags)}.", width=100, break_on_hyphens=False)


def layout(args: argparse.Namespace) -> None:
    (check_layout if args.check else generate_layout)(args)


def check_layout(args: argparse.Namespace) -> None:
    from bpgo_video.evaluation.vbench.suite import SuiteError, listing, read_suite
    from bpgo_video.evaluation.vbench.video_folder import layout_problems

    if args.more:
        raise SuiteError(f"--check makes nothing, and takes no {' '.join(args.more)}")
    suite = read_suite(args.suite, args.samples)
    if problems := layout_problems(args.output, suite, args.fps):
        raise SuiteError(f"{args.output} has {len(problems)} problems:{listing(problems)}")
    print(f"{args.output}: {len(suite.names())} videos, complete")


def generate_layout(args: argparse.Namespace) -> None:
    """Settings are read as `bpgo-video generate` reads them, before the ranks meet; files when all can fail."""
    from bpgo_video.config.command_line import read_settings
    from bpgo_video.evaluation.vbench.layout import lay_out, read_told
    from bpgo_video.evaluation.vbench.suite import read_suite
    from bpgo_video.generation.generate import ALONE, PATIENCE
    from bpgo_video.generation.settings import GenerationSettings
    from bpgo_video.parallel.agreement import same_verdict
    from bpgo_video.zero import engine

    given = {"policy": args.policy, "seed": args.seed, "output": args.output, "prompts": args.suite,
             "samples-per-prompt": args.samples, "fps": args.fps}  # fmt: skip
    flags = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    settings = read_settings(GenerationSettings, [*flags, *args.more], prog="bpgo-video evaluate layout")
    show_loading_once()
    mesh = engine.start_ranks(PATIENCE) if "RANK" in os.environ else ALONE
    with same_verdict(mesh):
        suite = read_suite(args.suite, args.samples)
        told = None if args.generation_prompts is None else read_told(args.generation_prompts, suite)
    manifest = lay_out(replace(settings, prompts=suite.source), suite, mesh, args.images, told)
    if mesh.is_main:
        print(manifest)
    engine.stop_ranks()


def add_score(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    command.description = (
        "Measure dimensions by VBench's formulas. Every result is labelled: exact (VBench's numbers, no network), "
        "native (VBench's formula and network) or proxy. Without --suite every video of DIR is measured. On several "
        "ranks with --ranks or a launcher; the same command continues where it was interrupted."
    )
    add("--videos", type=Path, required=True, metavar="DIR")
    add("--dimensions", nargs="+", required=True, metavar="D")
    add("--output", type=Path, required=True, metavar="FILE.json", help="VBench's result form, with labels")
    forms = "a network for a dimension: folder, hub id, short name (efficientnet, dis), or a factory, my_pkg.mod:build"
    add("--backbone", action="append", default=[], metavar="D=NETWORK", help=forms)
    add("--head", type=Path, metavar="FILE", help="LAION's aesthetic head, sa_0_4_vit_l_14_linear.pth")
    add("--device", type=device, help="of torch (cuda where there is one; of several ranks each its own)")
    add_suite(command)
    add_videos(command)
    add_ranks(command)
    command.set_defaults(run=score)


def score(args: argparse.Namespace) -> None:
    from bpgo_video.evaluation.ranks import ranks_or_alone
    from bpgo_video.evaluation.vbench.dimension import Sources
    from bpgo_video.evaluation.vbench.kept_scores import kept_beside
    from bpgo_video.evaluation.vbench.result_files import Result, write_results
    from bpgo_video.evaluation.vbench.scoring import Asked, score_folder
    from bpgo_video.evaluation.vbench.suite import read_suite
    from bpgo_video.parallel.agreement import same_verdict

    def done(results: Sequence[Result]) -> None:
        write_results(args.output, results)
        last = results[-1]
        labels = ", ".join(last.labels)
        print(f"{last.dimension:24} {last.score:.4f}  {labels}, {len(last.videos)} videos", flush=True)

    show_loading_once()
    with ranks_or_alone() as mesh:
        with same_verdict(mesh):
            backbones = dict(_pair(text) for text in args.backbone)
            suite = None if args.suite is None else read_suite(args.suite, args.samples)
            asked = Asked(args.videos, tuple(dict.fromkeys(args.dimensions)), backbones, suite, args.images, args.fps)
            sources = Sources(device_of(args.device, mesh), head=args.head)
        score_folder(asked, sources, mesh, kept_beside(args.output), done)
        if mesh.is_main:
            print(args.output)


def device_of(asked: str | None, mesh: Mesh) -> torch.device:
    """Where this rank measures.

    Raises:
        ValueError: one accelerator is named for several ranks.
    """
    import torch

    if asked is None:
        return mesh.device
    found = torch.device(asked)
    if mesh.world_size > 1 and found.index is not None:
        raise ValueError(f"--device {asked} is one device for {mesh.world_size} ranks; each takes its own without it")
    return mesh.device if found.type == mesh.device.type and mesh.world_size > 1 else found


def _pair(text: str) -> tuple[str, str]:
    dimension, equals, network = text.partition("=")
    if not (dimension and equals and network):
        raise ValueError(f"--backbone {text!r} must be DIMENSION=NETWORK")
    return dimension, network


def add_vbench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    command.description = (
        "Measure by VBench's own code: one process a dimension, checked results, real exit codes. "
        "On several ranks, with --ranks or a launcher, each takes its share of the dimensions."
    )
    add("--python", required=True, metavar="PYTHON", help="an interpreter with the package vbench")
    add("--videos", type=Path, required=True, metavar="DIR")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the results; it is continued",
    )
    add("--dimensions", nargs="+", metavar="D", help="(every one of the suite)")
    add("--benchmark", choices=("vbench", "vbench-i2v"), default="vbench")
    add("--device", type=device, default="cuda", help="of torch: cuda (default), cuda:1 or cpu")
    add("--resolution", default="1-1", help="vbench-i2v: of the images, 1-1 (default), 8-5, 7-4 or 16-9")
    add(
        "--folder", type=Path, default=Path(), metavar="DIR", help="vbench-i2v: where vbench2_beta_i2v/data/crop is (.)"
    )
    add("--local", action="store_true", help="VBench's option: only weights that are downloaded already")
    add_suite(command)
    add_ranks(command)
    command.set_defaults(run=vbench)


def vbench(args: argparse.Namespace) -> None:
    from bpgo_video.evaluation.ranks import ranks_or_alone
    from bpgo_video.evaluation.vbench.official import Official, measure_officially
    from bpgo_video.evaluation.vbench.suite import SuiteError, read_suite
    from bpgo_video.parallel.agreement import same_verdict

    with ranks_or_alone() as mesh:
        with same_verdict(mesh):
            suite = None if args.suite is None else read_suite(args.suite, args.samples)
            dimensions = tuple(dict.fromkeys(args.dimensions or (suite.dimensions if suite is not None else ())))
            if not dimensions:
                raise SuiteError("say which --dimensions: without VBench's own list nothing names them")
            if args.benchmark == "vbench-i2v" and suite is None:
                raise SuiteError("vbench-i2v needs its own list, vbench2_i2v_full_info.json: --suite FILE")
            options = {"local": args.local}
            options |= {"resolution": args.resolution} if args.benchmark == "vbench-i2v" else {}
            asked = Official(
                args.python, args.videos.absolute(), args.output.absolute(), args.benchmark, suite, dimensions,
                str(device_of(args.device, mesh)), args.folder.absolute(), options,
            )  # fmt: skip
        results = measure_officially(asked, mesh)
        if mesh.is_main:
            for result in results:
                print(f"{result.dimension:24} {result.score:.4f}  {len(result.videos)} videos")


def add_total(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    command.description = (
        "Totals of VBench, VBench-I2V or VBench-2.0, whichever has the dimensions. A set that is not whole, or has "
        "proxies, is refused; --partial takes it, and says in the result what is missing and what is a proxy."
    )
    add("results", nargs="+", type=Path, metavar="FILE.json", help="result files, or folders of *_eval_results.json")
    add("--json", action="store_true", help="print JSON alone")
    add("--partial", action="store_true", help="take what is there, and label it")
    add_suite(command)
    command.set_defaults(run=total)


def total(args: argparse.Namespace) -> None:
    from bpgo_video.evaluation.vbench.suite import read_suite
    from bpgo_video.evaluation.vbench.totals import labelled_totals

    suite = None if args.suite is None else read_suite(args.suite, args.samples)
    found = labelled_totals(args.results, suite, args.partial)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{name:16} {f'{value:.4f}' if isinstance(value, float) else value}")
