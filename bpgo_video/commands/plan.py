"""Compute the memory of a recipe on each rank before you request a GPU, and what to change if it does not fit.

    bpgo-video plan --config wan21_1.3b_480p_8x80gb --gpus 8 --gigabytes 80
    bpgo-video plan --model wan2.1-t2v-14b --size 480x832x81 --gpus 32 --sequence 4

Reads no weights and needs no GPU; `bpgo-video doctor` then measures a step on the GPUs themselves. Exit code 0 if the
job fits on a GPU of one of the given sizes, 1 if it fits on none, 2 if the recipe or a flag is wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.cli import above_zero, help_of, not_negative, positive, print_error
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.command_line import load_config
from bpgo_video.config.reading import config_from_dict, ds_config_file
from bpgo_video.distributed.ds_config import read_ds_config
from bpgo_video.training.plan import GPUS, Advice, Job, Plan, advise, count_step, reckon, room
from bpgo_video.training.plan_models import find_model
from bpgo_video.training.plan_zero import Parts

GB = 10**9
OFFLOADS = {
    "none": {},
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "all": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


@dataclass(frozen=True)
class ModelFlag:
    """A flag that replaces a recipe's setting.

    Attributes:
        recipe: the recipe's own flag for the same.
        options: of argparse.
    """

    recipe: str
    text: str
    default: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)


COUNT: dict[str, Any] = {"type": positive, "metavar": "N"}
MODEL_FLAGS = {
    "family": ModelFlag("--policy.family {}", "as policy.family in recipes: another pipeline, or module:Name"),
    "size": ModelFlag(
        "--video.height H --video.width W --video.num-frames N", "height x width x frames (480x832x81)", "480x832x81"
    ),
    "prompts": ModelFlag("--rollout.prompts-per-step {}", "a step (as many as fill the ranks once)", None, COUNT),
    "group-size": ModelFlag("--rollout.group-size {}", "samples of a prompt, G (8)", 8, COUNT),
    "micro-batch": ModelFlag("--rollout.micro-batch-size {}", "samples of a rank at once (1)", 1, COUNT),
    "zero": ModelFlag("--deepspeed zero{}", "stage (3)", 3, {"type": int, "choices": (1, 2, 3)}),
    "sequence": ModelFlag("--parallel.sequence {}", "ranks that share a sample's tokens (1)", 1, COUNT),
    "lora-rank": ModelFlag("--policy.lora.rank {}", "0 trains all weights (0)", 0, {"type": int, "metavar": "R"}),
    "offload": ModelFlag(
        "--deepspeed FILE, of a JSON that offloads", "to the CPU (none)", "none", {"choices": tuple(OFFLOADS)}
    ),
    "guidance": ModelFlag(
        "--sampler.guidance-scale {}", "above 1 both halves are computed (1)", 1.0, {"type": above_zero, "metavar": "S"}
    ),
    "no-checkpointing": ModelFlag(
        "--policy.no-gradient-checkpointing", "keep all activations in replay", False, {"action": "store_true"}
    ),
}


def parser(script: str | None = None) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(**help_of("plan", __doc__, script), formatter_class=formatter, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a recipe; its flags (--rollout.group-size 8) may follow")
    what.add_argument("--model", help="a known model, a hub id or a folder, with the flags below in place of a recipe")
    add = parser.add_argument
    add("--gpus", required=True, help="ranks of the whole run", **COUNT)
    sizes = f"of one GPU; several sizes are compared ({' '.join(map(str, GPUS))})"
    add("--gigabytes", type=positive, nargs="+", default=list(GPUS), metavar="GB", help=sizes)
    rewards = "of reward models on the policy's GPUs (0)"
    add("--reward-gigabytes", type=not_negative, default=0.0, metavar="GB", help=rewards)
    add("--json", action="store_true", help="print JSON in place of tables")
    group = parser.add_argument_group("with --model only")
    for name, flag in MODEL_FLAGS.items():
        group.add_argument(f"--{name}", help=flag.text, default=argparse.SUPPRESS, **flag.options)
    return parser


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The MODEL_FLAGS of the command line."""
    return {name: vars(arguments)[key] for name in MODEL_FLAGS if (key := name.replace("-", "_")) in arguments}


def all_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """All MODEL_FLAGS, with defaults."""
    return {name: flag.default for name, flag in MODEL_FLAGS.items()} | given_flags(arguments)


def job_of(arguments: argparse.Namespace, flags: Sequence[str]) -> Job:
    """The job of the command line.

    Raises:
        ConfigError: values that contradict each other, or an unknown model.
    """
    shared: dict[str, Any] = {
        "ranks": arguments.gpus,
        "reward_bytes": int(arguments.reward_gigabytes * GB),
        "gigabytes": max(arguments.gigabytes),
    }
    if arguments.config:
        for name, value in given_flags(arguments).items():
            instead = MODEL_FLAGS[name].recipe.format(value)
            raise ConfigError(f"--{name} is a flag of --model; with a recipe use {instead}")
        config = load_config(["--config", str(arguments.config), *flags])
        ds_config = read_ds_config(str(ds_config_file(config.deepspeed)))
        return Job(config, ds_config, model=find_model(config.policy.folder), **shared)
    if flags:
        raise ConfigError(f"{flags} are a recipe's flags, which --model does not take; see --help")
    recipe = config_from_dict(recipe_of(arguments), "command line")
    assert isinstance(recipe, Config)
    return Job(recipe, ds_config_of(arguments), model=find_model(arguments.model), **shared)


def recipe_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe that the flags describe; other settings have a recipe's defaults."""
    flags = all_flags(arguments)
    try:
        height, width, frames = map(int, flags["size"].split("x"))
    except ValueError:
        raise ConfigError(f"--size is {flags['size']!r}; it must be height x width x frames, 480x832x81") from None
    groups, group_size = max(1, arguments.gpus // flags["sequence"]), flags["group-size"]
    filling = -(-groups * flags["micro-batch"] // group_size)
    return {
        "run": {"dir": "none"},
        "policy": {
            "folder": arguments.model,
            "family": flags["family"],
            "max_sequence_length": find_model(arguments.model).text_tokens or 512,
            "gradient_checkpointing": not flags["no-checkpointing"],
            "lora": {"rank": flags["lora-rank"]},
        },
        "video": {"num_frames": frames, "height": height, "width": width, "fps": 16},
        "data": {"shards": "none"},
        "deepspeed": "none",
        "rewards": {"any": {"model": "none"}},
        "sampler": {"guidance_scale": flags["guidance"]},
        "rollout": {
            "prompts_per_step": flags["prompts"] or filling,
            "group_size": group_size,
            "micro_batch_size": flags["micro-batch"],
        },
        "parallel": {"sequence": flags["sequence"]},
    }


def ds_config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's settings that the flags describe: ZeRO in bf16."""
    flags = all_flags(arguments)
    return {"bf16": {"enabled": True}, "zero_optimization": {"stage": flags["zero"], **OFFLOADS[flags["offload"]]}}


def as_json(job: Job, plan: Plan, sizes: Sequence[int], advice: dict[int, Advice]) -> dict[str, Any]:
    return {
        "model": job.model.name,
        "step": asdict(count_step(job)),
        "phases": {phase.name: {**phase.parts, "total": phase.total} for phase in plan.phases},
        "host": plan.host,
        "gathers_for_rollout": plan.gathers,
        "tightest": plan.tightest.name,
        "fits": {str(size): plan.fits(size) for size in sizes},
        "advice": {str(size): vars(one) for size, one in advice.items()},
    }


def as_text(job: Job, plan: Plan, sizes: Sequence[int], advice: dict[int, Advice]) -> str:
    text = io.StringIO()
    console = Console(file=text, width=100, color_system=None)
    console.print(f"{job.model.name} ({job.model.source})\n{counts_of(job)}", highlight=False)
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


def counts_of(job: Job) -> str:
    """The numbers of a step, in three lines."""
    step = count_step(job)
    passes = " + ".join(map(str, step.passes))
    return (
        f"{step.ranks} ranks in {step.groups} groups; {step.samples} videos a step, {step.samples_per_group} a group "
        f"in {step.micro_batches} micro-batches\n"
        f"latents {' x '.join(map(str, step.latents))}; {step.forwards} forwards a rollout on each rank, "
        f"{len(step.passes)} updates of {passes} passes\n"
        f"{step.parameters:,} parameters, {step.trained:,} trained"
    )


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


def main(argv: Sequence[str] | None = None, script: str | None = None) -> int:
    """0 if the job fits on a GPU of one of the sizes, 1 if on none, 2 if the recipe or a flag is wrong."""
    arguments, flags = parser(script).parse_known_args(argv)
    try:
        job = job_of(arguments, flags)
        plan = reckon(job)
        short = [size for size in arguments.gigabytes if not plan.fits(size)]
        advice = {size: advise(job, plan, size) for size in [max(short)]} if short else {}
    except ConfigError as error:
        return print_error(error)
    if arguments.json:
        print(json.dumps(as_json(job, plan, arguments.gigabytes, advice), indent=1))
    else:
        print(as_text(job, plan, arguments.gigabytes, advice))
    return 1 if len(short) == len(arguments.gigabytes) else 0


if __name__ == "__main__":
    sys.exit(main())
