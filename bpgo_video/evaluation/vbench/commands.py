"""The subcommands of tools/evaluate.py for VBench: layout, score, vbench and total."""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from bpgo_video.cli import Parser, device, positive, show_loading_once

if TYPE_CHECKING:  # imported where they are needed: they are heavy, and --help should be quick
    import torch

    from bpgo_video.evaluation.vbench.suite import Suite
    from bpgo_video.parallel.mesh import Mesh

Add = Callable[..., argparse.Action]

DIR: dict[str, Any] = {"type": Path, "metavar": "DIR"}
SET_BY_LAYOUT = ("policy", "prompts", "output", "seed", "samples_per_prompt", "fps", "split")


def add_vbench_commands(commands: Any) -> None:
    """Adds the subcommands to what `add_subparsers` returned."""
    rows: tuple[tuple[Callable[..., None], Callable[[Add], None], str], ...] = (
        (layout, layout_flags, "generate a suite under VBench's names, or check one"),
        (score, score_flags, "measure VBench's dimensions on a folder of videos"),
        (vbench, vbench_flags, "run VBench's own package, in its own interpreter"),
        (total, total_flags, "VBench's totals of result files"),
    )
    for run, add_flags, summary in rows:
        command: Parser = commands.add_parser(run.__name__, help=summary, allow_abbrev=run is not layout)
        command.formatter_class, command.description = argparse.RawDescriptionHelpFormatter, inspect.getdoc(run)
        command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
        add_flags(command.add_argument)
        command.set_defaults(run=run)
        if run is layout:
            command.more_help = generation_flags
            command.set_defaults(more=[])


def suite_flags(add: Add, required: bool = False) -> None:
    kinds = "'vbench' (the list in the installed package), VBench's list (.json), or prompts (.txt, .jsonl, .csv)"
    add("--suite", required=required, help=kinds)
    add("--samples", type=positive, default=5, metavar="N", help="videos of each prompt (5)")


def video_flags(add: Add) -> None:
    add("--images", **DIR, help="VBench-I2V's images of one aspect ratio: data/crop/16-9")
    add("--fps", type=float, metavar="F", help="frames a second that every video has")


def suite_of(args: argparse.Namespace) -> Suite | None:
    from bpgo_video.evaluation.vbench.suite import read_suite

    return None if args.suite is None else read_suite(args.suite, args.samples)


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
    from bpgo_video.generation.settings import GenerationSettings

    names = [field.name for field in fields(GenerationSettings) if field.name not in SET_BY_LAYOUT]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    intro = "The flags of pipelines/generate_video.py apply, except --prompts and --samples-per-prompt, the suite's"
    return fill(f"{intro}: {flags}.", width=100, break_on_hyphens=False)


def layout(args: argparse.Namespace) -> None:
    """Generate a suite into DIR as {prompt}-{i}.mp4, on several ranks by the deepspeed launcher. The same command
    continues an interrupted one; its exit code is 0 when every video is there and complete.
    """
    from bpgo_video.evaluation.vbench.folder import video_problems
    from bpgo_video.evaluation.vbench.suite import SuiteError, listing, read_suite

    if not args.check:
        generate_layout(args)
        return
    if args.more:
        raise SuiteError(f"--check generates nothing, and takes no {' '.join(args.more)}")
    suite = read_suite(args.suite, args.samples)
    if problems := video_problems(args.output, suite, fps=args.fps, whole=True):
        raise SuiteError(f"{args.output} has {len(problems)} problems:{listing(problems)}")
    print(f"{args.output}: {len(suite.names())} videos, complete")


def generate_layout(args: argparse.Namespace) -> None:
    """Settings are read as pipelines/generate_video.py reads them, before ranks meet; files when all ranks can fail."""
    from bpgo_video.config.command_line import read_settings
    from bpgo_video.evaluation.vbench.layout import lay_out, read_texts
    from bpgo_video.evaluation.vbench.suite import read_suite
    from bpgo_video.generation.generate import ALONE, PATIENCE
    from bpgo_video.generation.settings import GenerationSettings
    from bpgo_video.parallel.agreement import same_verdict
    from bpgo_video.zero import engine

    given = {"policy": args.policy, "seed": args.seed, "output": args.output, "prompts": args.suite,
             "samples-per-prompt": args.samples, "fps": args.fps}  # fmt: skip
    flags = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    settings = read_settings(GenerationSettings, [*flags, *args.more], prog="evaluate.py layout")
    show_loading_once()
    mesh = engine.start_ranks(PATIENCE) if "RANK" in os.environ else ALONE
    with same_verdict(mesh):
        suite = read_suite(args.suite, args.samples)
        texts = args.generation_prompts and read_texts(args.generation_prompts, suite)
    manifest = lay_out(replace(settings, prompts=suite.source), suite, mesh, args.images, texts)
    if mesh.is_main:
        print(manifest)
    engine.stop_ranks()


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


def score(args: argparse.Namespace) -> None:
    """Measure dimensions by VBench's formulas. Every result is labelled: exact (VBench's numbers, no network),
    native (VBench's formula and network) or proxy. Without --suite every video of DIR is measured. On several
    ranks by the deepspeed launcher; the same command continues an interrupted one.
    """
    from bpgo_video.evaluation.ranks import ranks_or_alone
    from bpgo_video.evaluation.vbench.networks import Sources
    from bpgo_video.evaluation.vbench.results import Result, write_results
    from bpgo_video.evaluation.vbench.scoring import Request, kept_beside, score_folder
    from bpgo_video.parallel.agreement import same_verdict

    def done(results: Sequence[Result]) -> None:
        write_results(args.output, results)
        last = results[-1]
        labels = ", ".join(last.labels)
        print(f"{last.dimension:24} {last.score:.4f}  {labels}, {len(last.videos)} videos", flush=True)

    show_loading_once()
    with ranks_or_alone() as mesh:
        with same_verdict(mesh):
            backbones, dimensions = dict(map(backbone, args.backbone)), tuple(dict.fromkeys(args.dimensions))
            request = Request(args.videos, dimensions, backbones, suite_of(args), args.images, args.fps)
            sources = Sources(device_of(args.device, mesh), head=args.head)
        score_folder(request, sources, mesh, kept_beside(args.output), done)
        if mesh.is_main:
            print(args.output)


def backbone(text: str) -> tuple[str, str]:
    dimension, _, network = text.partition("=")
    if not (dimension and network):
        raise ValueError(f"--backbone {text!r} must be DIMENSION=NETWORK")
    return dimension, network


def device_of(requested: str | None, mesh: Mesh) -> torch.device:
    """The device of this rank. Raises ValueError where one accelerator is named for several ranks."""
    import torch

    found = mesh.device if requested is None else torch.device(requested)
    if requested is not None and mesh.world_size > 1 and found.index is not None:
        raise ValueError(
            f"--device {requested} is one device for {mesh.world_size} ranks; omit it, and each has its own"
        )
    return mesh.device if found.type == mesh.device.type and mesh.world_size > 1 else found


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


def vbench(args: argparse.Namespace) -> None:
    """Measure by VBench's own code: one process a dimension, checked results, real exit codes. On several ranks
    by the deepspeed launcher each takes its share of the dimensions.
    """
    from bpgo_video.evaluation.ranks import ranks_or_alone
    from bpgo_video.evaluation.vbench.package import PackageRequest, measure_by_package
    from bpgo_video.evaluation.vbench.suite import SuiteError
    from bpgo_video.parallel.agreement import same_verdict

    with ranks_or_alone() as mesh:
        with same_verdict(mesh):
            suite, i2v = suite_of(args), args.benchmark == "vbench-i2v"
            dimensions = tuple(dict.fromkeys(args.dimensions or (suite.dimensions if suite is not None else ())))
            if not dimensions:
                raise SuiteError("name --dimensions: only VBench's own list, by --suite, names them itself")
            if i2v and suite is None:
                raise SuiteError("vbench-i2v needs its own list, vbench2_i2v_full_info.json: --suite FILE")
            options = {"local": args.local} | ({"resolution": args.resolution} if i2v else {})
            videos, output, folder = (path.absolute() for path in (args.videos, args.output, args.folder))
            chosen = str(device_of(args.device, mesh))
            request = PackageRequest(
                args.python, videos, output, args.benchmark, suite, dimensions, chosen, folder, options
            )
        results = measure_by_package(request, mesh)
        if mesh.is_main:
            for result in results:
                print(f"{result.dimension:24} {result.score:.4f}  {len(result.videos)} videos")


def total_flags(add: Add) -> None:
    add("results", nargs="+", type=Path, metavar="FILE.json", help="result files, or folders of *_eval_results.json")
    add("--json", action="store_true", help="print JSON alone")
    add("--partial", action="store_true", help="take what is there, and label it")
    suite_flags(add)


def total(args: argparse.Namespace) -> None:
    """Totals of VBench, VBench-I2V or VBench-2.0, whichever has the dimensions. An incomplete set, or one with
    proxies, is refused; --partial takes it, and says in the result what is missing and what is a proxy.
    """
    from bpgo_video.evaluation.vbench.totals import labelled_totals

    found = labelled_totals(args.results, suite_of(args), args.partial)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{name:16} {f'{value:.4f}' if isinstance(value, float) else value}")
