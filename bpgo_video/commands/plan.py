"""Compute the memory of a recipe on each rank before you request a GPU, and what to change if it does not fit.

    bpgo-video plan wan21_1.3b_480p_8x80gb --gpus 8
    bpgo-video plan my_recipe.yaml --gpus 16 --gigabytes 40 80 --rollout.micro-batch-size 2
    bpgo-video plan --model wan2.1-t2v-14b --gpus 32 --sequence 4 --lora-rank 32
    bpgo-video plan --model path/to/pipeline --gpus 8 --size 480x832x49 --zero 2

Reads no weights and needs no GPU; `bpgo-video doctor` then measures a step on the GPUs themselves. Exit code 0 if the
job fits on a GPU of one of the given sizes, 1 if it fits on none, 2 if the recipe or a flag is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from bpgo_video.cli import help_of, not_negative, positive, print_error
from bpgo_video.config.bpgo import Config
from bpgo_video.config.command_line import apply_flags, load_config, recipe_as_flag
from bpgo_video.config.deepspeed import read_ds_config
from bpgo_video.config.reading import config_from_dict, ds_config_file
from bpgo_video.errors import InputError

GPUS = (24, 40, 80, 141)  # gigabytes
PROMPTS = "--rollout.prompts-per-step"
SHORT = {  # -> the recipe's own flag
    "--family": "--policy.family",
    "--prompts": PROMPTS,
    "--group-size": "--rollout.group-size",
    "--micro-batch": "--rollout.micro-batch-size",
    "--sequence": "--parallel.sequence",
    "--lora-rank": "--policy.lora.rank",
    "--guidance": "--sampler.guidance-scale",
    "--no-checkpointing": "--policy.no-gradient-checkpointing",
}
OFFLOADS = {"optimizer": ["offload_optimizer"], "all": ["offload_optimizer", "offload_param"]}
MODEL = "a published model, a hub id or a folder, with defaults: 480x832x81, bf16, ZeRO-3, checkpointing, groups of 8"
FLAGS = "flags of the recipe follow, as --rollout.group-size 8; shorter ones are\n  " + "\n  ".join(
    f"{short:20}{flag}" for short, flag in SHORT.items()
)


def parser(script: str | None = None) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    described = {**help_of("plan", __doc__, script), "epilog": FLAGS}
    parser = argparse.ArgumentParser(**described, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a recipe: a file, or a shipped one; it may be the first word")
    what.add_argument("--model", help=MODEL)
    add("--gpus", required=True, type=positive, metavar="N", help="ranks of the whole run")
    sizes = f"of one GPU; several sizes are compared ({' '.join(map(str, GPUS))})"
    add("--gigabytes", type=positive, nargs="+", default=list(GPUS), metavar="GB", help=sizes)
    rewards = "of reward models on the policy's GPUs (0)"
    add("--reward-gigabytes", type=not_negative, default=0.0, metavar="GB", help=rewards)
    add("--size", type=size, metavar="HxWxF", help="height x width x frames of a video")
    add("--zero", type=int, choices=(1, 2, 3), help="stage of ZeRO, in place of the DeepSpeed JSON's")
    add("--offload", choices=OFFLOADS, help="to the CPU, besides what the JSON offloads")
    add("--json", action="store_true", help="print JSON in place of text")
    return parser


def size(text: str) -> list[str]:
    """An argument's type: a video's size, as flags of a recipe."""
    names, numbers = ("height", "width", "num-frames"), text.split("x")
    if len(numbers) != len(names) or not all(map(str.isdigit, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} must be height x width x frames, 480x832x81")
    return [f"--video.{name}={number}" for name, number in zip(names, numbers, strict=True)]


def job_of(arguments: argparse.Namespace, words: Sequence[str]) -> Any:
    """The Job of the command line, checked before torch is imported; `words` are flags of the recipe.

    Raises:
        ConfigError: values that contradict each other, or an unknown model.
    """
    parted = [word.partition("=") for word in words]
    flags = [SHORT.get(name, name) + sign + value for name, sign, value in parted] + (arguments.size or [])
    config = (
        load_config(["--config", str(arguments.config), *flags])
        if arguments.config
        else config_of(arguments.model, flags)
    )

    from bpgo_video.training.plan import Job, change
    from bpgo_video.training.plan_models import find_model

    model = find_model(config.policy.folder)
    if arguments.model and model.text_tokens:
        config = config_of(arguments.model, flags, model.text_tokens)
    if arguments.model and not any(flag.startswith(PROMPTS) for flag in flags):
        rollout, groups = config.rollout, max(1, arguments.gpus // config.parallel.sequence)
        filling = -(-groups * rollout.micro_batch_size // rollout.group_size)
        config = replace(config, rollout=replace(rollout, prompts_per_step=filling))
    job = Job(
        config,
        read_ds_config(str(ds_config_file(config.deepspeed))),
        arguments.gpus,
        model,
        reward_bytes=int(arguments.reward_gigabytes * 1e9),
        gigabytes=max(arguments.gigabytes),
    )
    stage = [f"stage: {arguments.zero}"] if arguments.zero else []
    offload = [f"{part}: {{device: cpu}}" for part in OFFLOADS.get(arguments.offload, [])]
    return reduce(change, (f"zero_optimization.{words}" for words in stage + offload), job)


def config_of(model: str, flags: Sequence[str], tokens: int = 512) -> Config:
    """A recipe of a model: defaults, and the flags."""
    tree = {
        "run": {"dir": "none"},
        "policy": {"folder": model, "max_sequence_length": tokens, "gradient_checkpointing": True},
        "video": {"num_frames": 81, "height": 480, "width": 832, "fps": 16},
        "data": {"shards": "none"},
        "deepspeed": "zero3_bf16",
        "rewards": {"any": {"model": "none"}},
        "rollout": {"prompts_per_step": 1, "group_size": 8, "micro_batch_size": 1},
    }
    config = apply_flags(config_from_dict(tree, "--model"), flags)
    assert isinstance(config, Config)
    return config


def main(words: Sequence[str], script: str | None = None) -> int:
    """0 if the job fits on a GPU of one of the sizes, 1 if on none, 2 if the recipe or a flag is wrong."""
    arguments, flags = parser(script).parse_known_args(recipe_as_flag(words))
    try:
        job = job_of(arguments, flags)

        from bpgo_video.training.plan_advice import advise
        from bpgo_video.training.plan_memory import reckon
        from bpgo_video.training.plan_report import as_json, as_text

        plan = reckon(job)
        short = [size for size in arguments.gigabytes if not plan.fits(size)]
        advised = {size: advise(job, plan, size) for size in [max(short)]} if short else {}
    except (InputError, OSError) as error:
        return print_error(error)
    if arguments.json:
        print(json.dumps(as_json(job, plan, arguments.gigabytes, advised), indent=1))
    else:
        print(as_text(job, plan, arguments.gigabytes, advised))
    return 1 if len(short) == len(arguments.gigabytes) else 0
