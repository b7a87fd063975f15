"""`bpgo-video study`: which trust gains against GRPO, and how much, from a pre-registration older than the results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from inspect import getdoc
from pathlib import Path
from typing import Any

from bpgo_video.cli import Parser, help_of, positive, run_command, typed
from bpgo_video.errors import InputError, unknown
from bpgo_video.study.preregistration import GRPO, PREREGISTRATION, Arm, Regime, Surrogate, read_preregistration

REPORT = "report.md"


def main(words: Sequence[str], script: str | None = None) -> int:
    """Study which trust gains against GRPO: arms, regimes, seeds and tests are those of a pre-registration.

        bpgo-video study surrogate --list
        bpgo-video study surrogate --output runs/study --processes 2
        bpgo-video study surrogate --output runs/other-seeds --first-seed 100 --arms frames,mean_reliability
        bpgo-video study signals --output runs/signals
        bpgo-video study signals --output runs/signals --groups dump.jsonl.gz
        bpgo-video study video --output runs/video-study --processes 2

    surrogate trains Gaussian policies that share parameters, whose true rewards are known, with the project's learner.
    In each regime a judge errs in its own way; each arm is one way to weight or score. The result is the gain against
    GRPO on paired seeds, with bootstrap intervals, Holm's correction and an equivalence test, and the cost.

    signals asks on real groups with an oracle what each trust knows: its rank correlation with a group's validity, and
    the cosine of the weighted advantage to the one without error. Without --groups it samples the embedded policy.

    video trains the embedded policy itself, on a reward with added errors, and compares held-out gains on paired seeds,
    with reward calls and time. It takes about a minute of two cores for each run of an arm and a seed.

    DIR/report.md has the tables and plots; a JSON file next to it every number. To continue after a kill, repeat the
    command; results of other settings in DIR are refused. The package has the pre-registration;
    --preregistration takes a file of the same form with regimes or arms of your own. docs/study.md has results.
    """
    parser = Parser(**help_of("study", getdoc(main), script))
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, (add_flags, run, text) in KINDS.items():
        kind = kinds.add_parser(name, help=text, description=text)
        kind.add_argument("--output", type=Path, metavar="DIR", help="folder of results, new or to continue")
        kind.add_argument(
            "--preregistration", type=Path, default=PREREGISTRATION, metavar="FILE", help="(the package's)"
        )
        add_flags(kind.add_argument)
        kind.set_defaults(run=run, kind=name)
    return run_command(parser, words)


def surrogate_flags(add: Callable[..., argparse.Action]) -> None:
    add("--list", action="store_true", help="print arms and regimes, and end")
    add("--seeds", type=positive, metavar="N", help="number of paired seeds (the pre-registration's)")
    add("--first-seed", type=int, metavar="S", help="seeds S, S + 1, ... (the pre-registration's)")
    add("--arms", type=names, metavar="A,B", help="only these arms, and grpo; a later call may add others to DIR (all)")
    add("--regimes", type=names, metavar="A,B", help="only these regimes; a later call may add others to DIR (all)")
    add("--processes", type=positive, default=1, metavar="N", help="each on one core (%(default)s)")


def signal_flags(add: Callable[..., argparse.Action]) -> None:
    add(
        "--groups",
        type=Path,
        metavar="FILE",
        help="dump of groups, .jsonl or .jsonl.gz; new ones are sampled without it",
    )
    add("--seed", type=int, metavar="S", help="of sampled groups and added noise (the pre-registration's)")
    add("--prompts", type=positive, metavar="N", help="sample only the first N training prompts (all)")


def names(text: str) -> list[str]:
    """A, B and C of `A,B,C`."""
    return [name for name in text.split(",") if name]


def surrogate(args: argparse.Namespace) -> None:
    plan = chosen(read_preregistration(args.preregistration).surrogate, args)
    if args.list:
        print(listing(plan))
        return
    output = required(args.output)
    from bpgo_video.files import atomic_file, write_json
    from bpgo_video.study import plots, report
    from bpgo_video.study.jobs import run_study
    from bpgo_video.study.results import owned

    with owned(output):
        results = run_study(plan, output, args.processes)
        compared = report.compare(
            plan, {name: list(results.settings[name]) for name in ("regimes", "arms")}, results.lines
        )
        write_json(output / "comparison.json", report.as_json(compared))
        plots.draw_gains(compared, output / "gains.svg")
        plots.draw_intervals(compared, output / "intervals.svg")
        text = report.as_markdown(plan, compared, heading(args))
        with atomic_file(output / REPORT) as aside:
            aside.write_text(text, "utf-8")
    print(f"{report.gains_table(compared)}\n\n{output / REPORT}")


def signals(args: argparse.Namespace) -> None:
    plan = read_preregistration(args.preregistration).signals
    plan = plan if args.seed is None else replace(plan, seed=args.seed)
    output = required(args.output)
    from bpgo_video.files import atomic_file, write_json
    from bpgo_video.study import plots, signal_report
    from bpgo_video.study.groups import read_groups
    from bpgo_video.study.results import owned
    from bpgo_video.study.signals import signal_table

    with owned(output):
        path = args.groups or sampled_groups(output, plan.seed, plan.group_size, plan.groups, args.prompts)
        groups = read_groups(path, plan.group_size)
        rows = signal_table(groups, plan)
        write_json(output / "signals.json", signal_report.as_json(plan, rows))
        plots.draw_signals(rows, output / "signals.svg")
        found = {"groups": f"{len(groups.prompts)} of {plan.group_size} samples, {path.name}"}
        with atomic_file(output / REPORT) as aside:
            aside.write_text(signal_report.as_markdown(plan, rows, heading(args) | found), "utf-8")
    print(f"{signal_report.rows_table(rows)}\n\n{output / REPORT}")


def video_flags(add: Callable[..., argparse.Action]) -> None:
    add("--seeds", type=positive, metavar="N", help="number of paired seeds (the pre-registration's)")
    add("--first-seed", type=int, metavar="S", help="seeds S, S + 1, ... (the pre-registration's)")
    add("--processes", type=positive, default=1, metavar="N", help="runs at once, each on one core (%(default)s)")


def video(args: argparse.Namespace) -> None:
    flags = {name: getattr(args, name) for name in ("seeds", "first_seed") if getattr(args, name) is not None}
    plan = replace(read_preregistration(args.preregistration).video, **flags)
    output = required(args.output)
    from bpgo_video.commands.shipped import build_prompts
    from bpgo_video.files import atomic_file, write_json
    from bpgo_video.study import video_report
    from bpgo_video.study.results import owned
    from bpgo_video.study.video import run_study

    with owned(output):
        build_prompts(output / "prompts")
        results = video_report.compare(plan, run_study(plan, output, output / "prompts", args.processes))
        write_json(output / "comparison.json", video_report.as_json(results))
        with atomic_file(output / REPORT) as aside:
            aside.write_text(video_report.as_markdown(plan, results, heading(args)), "utf-8")
    print(f"{video_report.results_table(results)}\n\n{output / REPORT}")


# name -> flags, the command, summary
KINDS: dict[str, tuple[Callable[..., None], Callable[[argparse.Namespace], None], str]] = {
    "surrogate": (surrogate_flags, surrogate, "train policies with known true rewards, and compare the arms"),
    "signals": (signal_flags, signals, "what each trust knows of real groups with an oracle"),
    "video": (video_flags, video, "train the embedded policy on a noisy reward, and compare the arms"),
}


def chosen(plan: Surrogate, args: argparse.Namespace) -> Surrogate:
    """The pre-registration with the seeds, arms and regimes of the command line."""
    changes: dict[str, Any] = {
        name: getattr(args, name) for name in ("seeds", "first_seed") if getattr(args, name) is not None
    }
    if args.arms is not None:
        changes["arms"] = subset("--arms", plan.arms, {GRPO, *args.arms})
    if args.regimes is not None:
        changes["regimes"] = subset("--regimes", plan.regimes, args.regimes)
    arms, regimes = changes.get("arms", plan.arms), changes.get("regimes", plan.regimes)
    demands = [
        replace(demand, regimes=[name for name in demand.regimes if name in regimes])
        for demand in plan.demands
        if {demand.arm, demand.minus} <= arms.keys()
    ]
    return replace(plan, **changes, demands=demands)


def subset(flag: str, table: dict[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """The entries of these names, in the order of the table."""
    for name in (kept := set(wanted)):
        if name not in table:
            raise InputError(unknown(flag, name, table))
    return {name: value for name, value in table.items() if name in kept}


def listing(plan: Surrogate) -> str:
    """Arms and regimes with what they set."""
    from bpgo_video.documents import to_yaml
    from bpgo_video.study.preregistration import as_written

    parts: dict[str, Mapping[str, Regime | Arm]] = {"regimes": plan.regimes, "arms": plan.arms}
    tree = {title: {name: as_written(one) for name, one in of.items()} for title, of in parts.items()}
    seeds = f"{plan.seeds} seeds from {plan.first_seed}, {plan.world.steps} steps"
    return (
        f"# {seeds}; what is not listed has its default (bpgo_video/study/preregistration.py)\n{to_yaml(tree)}".rstrip()
    )


def required(output: Path | None) -> Path:
    if output is None:
        raise InputError("--output is required: the folder of the results, such as runs/study")
    return output


def heading(args: argparse.Namespace) -> dict[str, str]:
    """Where the results come from."""
    import torch

    from bpgo_video.files import fingerprint_of
    from bpgo_video.training.environment import hardware

    file = args.preregistration
    return {
        "command": f"`{typed('study', args.words)}`",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{hardware(torch.device('cpu'))}, {os.cpu_count()} cores",
        "pre-registration": f"{file.name}, {fingerprint_of(file.parent, [file.name])}",
    }


def sampled_groups(output: Path, seed: int, group_size: int, groups: int, prompts: int | None) -> Path:
    """A dump of new groups in the output's folder, continued if a kill cut it off."""
    from bpgo_video.commands.shipped import RECIPE, build_prompts
    from bpgo_video.config.reading import PACKAGE, RECIPES
    from bpgo_video.distributed import process_group
    from bpgo_video.files import fingerprint, fingerprint_of
    from bpgo_video.study.results import open_settings
    from bpgo_video.study.sampling import sample_groups, sampling_of
    from bpgo_video.training.loop import launched

    shards, path = output / "prompts", output / "groups.jsonl"
    drawn = {"seed": seed, "group_size": group_size, "groups": groups, "prompts": prompts}
    weights = fingerprint(PACKAGE / "tiny" / "weights", ("wan", "clip", "motion"))
    open_settings(
        output, {"kind": "signals", **drawn, "recipe": fingerprint_of(RECIPES, [f"{RECIPE}.yaml"]), "weights": weights}
    )
    build_prompts(shards)
    with launched():
        sample_groups(sampling_of(RECIPE, shards, seed, group_size, groups, prompts), process_group.start_ranks(), path)
    return path
