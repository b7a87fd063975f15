"""The command line of tools/plan_memory.py: a recipe, or a model and a size, onto GPUs of some sizes."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import config_from_dict, load_config
from bpgo_video.planning.advice import Advice, advise
from bpgo_video.planning.dry_run import dry_run
from bpgo_video.planning.models import find_model
from bpgo_video.planning.plan import GPUS, Job, Plan, reckon, room
from bpgo_video.planning.zero import Parts
from bpgo_video.zero.engine import read_ds_config

GB = 10**9
DESCRIPTION = "Reckon the memory of a recipe, or of a model and a size, on each rank; no weights are read."
OFFLOADS = {
    "none": {},
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "all": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="tools/plan_memory.py", description=DESCRIPTION, allow_abbrev=False)
    what = found.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a recipe; its flags (--rollout.group-size 8) may follow")
    what.add_argument("--model", help="a known model, a hub id or a folder, with the flags below in place of a recipe")
    found.add_argument("--family", help="of --model, as policy.family in recipes: another pipeline, or module:Name")
    found.add_argument("--gpus", type=int, required=True, help="of the whole run")
    found.add_argument(
        "--gigabytes", type=int, nargs="+", default=list(GPUS), help="of one GPU; several sizes are compared"
    )
    found.add_argument("--reward-gigabytes", type=float, default=0.0, help="of reward models on the policy's GPUs")
    found.add_argument("--json", action="store_true", help="print JSON in place of tables")
    found.add_argument("--size", default="480x832x81", help="height x width x frames (%(default)s)")
    found.add_argument("--prompts", type=int, default=None, help="a step (as many as fill the ranks once)")
    found.add_argument("--group-size", type=int, default=8, help="samples of a prompt, G (%(default)s)")
    found.add_argument("--micro-batch", type=int, default=1, help="samples of a rank at once (%(default)s)")
    found.add_argument("--zero", type=int, choices=(1, 2, 3), default=3, help="stage (%(default)s)")
    found.add_argument("--sequence", type=int, default=1, help="ranks that share a sample's tokens (%(default)s)")
    found.add_argument("--lora-rank", type=int, default=0, help="0 trains all weights (%(default)s)")
    found.add_argument("--offload", choices=tuple(OFFLOADS), default="none", help="to the CPU (%(default)s)")
    found.add_argument("--guidance", type=float, default=1.0, help="above 1 both halves are computed (%(default)s)")
    found.add_argument("--no-checkpointing", action="store_true", help="keep all activations in replay")
    return found


def job_of(arguments: argparse.Namespace, flags: Sequence[str]) -> Job:
    """What is asked for.

    Raises:
        ConfigError: values that do not go together, or a model that is not known.
    """
    shared: dict[str, Any] = {
        "ranks": arguments.gpus,
        "reward_bytes": int(arguments.reward_gigabytes * GB),
        "gigabytes": max(arguments.gigabytes),
    }
    if arguments.config:
        config = load_config(["--config", str(arguments.config), *flags], description=DESCRIPTION)
        return Job(config, read_ds_config(config.deepspeed), model=find_model(config.policy.folder), **shared)
    if flags:
        raise ConfigError(f"{flags} are flags of a recipe, and --model takes none; see --help")
    recipe = config_from_dict(recipe_of(arguments), "command line")
    assert isinstance(recipe, Config)  # one that names no other kind
    ds_config = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": arguments.zero, **OFFLOADS[arguments.offload]},
    }
    return Job(recipe, ds_config, model=find_model(arguments.model), **shared)


def recipe_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """A recipe of the flags, with the defaults of recipes elsewhere."""
    try:
        height, width, frames = map(int, arguments.size.split("x"))
    except ValueError:
        raise ConfigError(f"--size is {arguments.size!r}; it must be height x width x frames, 480x832x81") from None
    groups, group_size = max(1, arguments.gpus // arguments.sequence), arguments.group_size
    filling = -(-groups * arguments.micro_batch // group_size)
    return {
        "run": {"dir": "none"},
        "policy": {
            "folder": arguments.model,
            "family": arguments.family,
            "max_sequence_length": find_model(arguments.model).text_tokens or 512,
            "gradient_checkpointing": not arguments.no_checkpointing,
            "lora": {"rank": arguments.lora_rank},
        },
        "video": {"num_frames": frames, "height": height, "width": width, "fps": 16},
        "data": {"shards": "none"},
        "deepspeed": "none",
        "rewards": {"any": {"model": "none"}},
        "sampler": {"guidance_scale": arguments.guidance},
        "rollout": {
            "prompts_per_step": arguments.prompts or filling,
            "group_size": group_size,
            "micro_batch_size": arguments.micro_batch,
        },
        "parallel": {"sequence": arguments.sequence},
    }


def as_json(job: Job, plan: Plan, sizes: Sequence[int], advice: dict[int, Advice]) -> dict[str, Any]:
    return {
        "model": job.model.name,
        "step": dry_run(job).as_dict(),
        "phases": {phase.name: {**phase.parts, "total": phase.total} for phase in plan.phases},
        "host": plan.host,
        "gathers_for_rollout": plan.gathers,
        "tightest": plan.tightest.name,
        "fits": {str(size): plan.fits(size) for size in sizes},
        "advice": {str(size): vars(found) for size, found in advice.items()},
    }


def as_text(job: Job, plan: Plan, sizes: Sequence[int], advice: dict[int, Advice]) -> str:
    text = io.StringIO()
    console = Console(file=text, width=100, color_system=None)
    console.print(f"{job.model.name} ({job.model.source})\n{dry_run(job).as_text()}", highlight=False)
    console.print(memory_table(plan))
    if plan.host:
        console.print(f"On the host, for each rank: {_listed(plan.host)}", highlight=False)
    for size in sizes:
        room_left = f"{room(size) / GB:.1f} of {size} GB are for tensors"
        verdict = "fits" if plan.fits(size) else f"does not fit, {plan.tightest.name} is the tightest"
        console.print(f"{size} GB: {verdict} ({plan.peak / GB:.1f} GB needed, {room_left})", highlight=False)
        if size in advice:
            console.print(_advised(advice[size]), highlight=False)
    return text.getvalue().rstrip()


def memory_table(plan: Plan) -> Table:
    """Gigabytes by part and phase."""
    table = Table(box=box.ROUNDED, title="GB of a rank's GPU", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    for name in dict.fromkeys(name for phase in plan.phases for name in phase.parts):
        sizes = [phase.parts.get(name) for phase in plan.phases]
        table.add_row(name, *("" if size is None else f"{size / GB:.2f}" for size in sizes))
    table.add_section()
    table.add_row("together", *(f"{phase.total / GB:.2f}" for phase in plan.phases))
    return table


def _listed(parts: Parts) -> str:
    return ", ".join(f"{name} {size / GB:.2f} GB" for name, size in parts.items() if size)


def _advised(advice: Advice) -> str:
    if not advice.changes:
        return "   no setting helps: take a smaller video or larger GPUs"
    verdict = "then it fits" if advice.fits else "and it still does not fit: take a smaller video or larger GPUs"
    return f"   change first: {'; '.join(advice.changes)}. {verdict} ({advice.peak / GB:.1f} GB)"


def main(argv: Sequence[str] | None = None) -> int:
    """0 where the job fits on one of the sizes asked for, 1 where it fits on none, 2 where it is wrong."""
    arguments, flags = parser().parse_known_args(argv)
    try:
        job = job_of(arguments, flags)
        plan = reckon(job)
        short = [size for size in arguments.gigabytes if not plan.fits(size)]
        advice = {size: advise(job, plan, size) for size in [max(short)]} if short else {}
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(as_json(job, plan, arguments.gigabytes, advice), indent=1))
    else:
        print(as_text(job, plan, arguments.gigabytes, advice))
    return 1 if len(short) == len(arguments.gigabytes) else 0
