"""Predict memory, hours and cost of a recipe before you request a GPU, and what to change if it does not fit.

    bpgo-video plan wan21_1.3b_480p_8x80gb --gpus 8
    bpgo-video plan wan21_14b_480p_32x80gb --gpus 32 --card h100 --price 2.5
    bpgo-video plan my_recipe.yaml --gpus 16 --gigabytes 40 80 --rollout.micro-batch-size 2
    bpgo-video plan --model wan2.1-t2v-14b --gpus 32 --sequence 4 --lora-rank 32
    bpgo-video plan tiny_wan_bpgo --gpus 2 --calibrate --rates rates.json

Reads no weights and needs no GPU. Seconds follow from counted operations and from a card's published rates, of which
--mfu is reached (an assumption); --calibrate measures a few passes on this machine instead, and writes what it reaches
to --rates, which later plans read. `bpgo-video doctor` then runs a step on the GPUs themselves.

Exit code 0 if the job fits on a GPU of one of the given sizes, 1 if on none, 2 if the recipe or a flag is wrong, 3 if
it may fit, but the size of a reward model is not known (--reward-gigabytes states it).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from bpgo_video.cli import above_zero, above_zero_share, help_of, not_negative, positive, print_error
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.command_line import apply_flags, load_config, recipe_as_flag
from bpgo_video.config.deepspeed import read_ds_config
from bpgo_video.config.reading import config_from_dict, ds_config_file
from bpgo_video.errors import InputError
from bpgo_video.planning.cards import CARDS, MFU, card_of, rates_of, read_rates, with_network, write_rates

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
    sizes = f"of one GPU; several sizes are compared (the card's, or {' '.join(map(str, GPUS))})"
    add("--gigabytes", type=positive, nargs="+", metavar="GB", help=sizes)
    rewards = "of reward models on the policy's GPUs (what is known of the recipe's)"
    add("--reward-gigabytes", type=not_negative, metavar="GB", help=rewards)
    add("--card", choices=CARDS, help="the GPU whose rates give the seconds (the smallest of --gigabytes, or h100)")
    add(
        "--mfu",
        type=above_zero_share,
        default=MFU,
        metavar="SHARE",
        help="of the card's peak rate that is reached (%(default)s)",
    )
    network = "network rate of each GPU between hosts, in Gb/s (the card's usual machine)"
    add("--link-gbps", type=above_zero, metavar="GBPS", help=network)
    add("--price", type=not_negative, help="of a GPU-hour, in your currency")
    add("--rates", type=Path, metavar="FILE", help="measured rates, in place of the card's; written by --calibrate")
    add("--calibrate", action="store_true", help="measure this machine at the recipe's shapes, and write --rates")
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

    from bpgo_video.planning.job import Job, change
    from bpgo_video.planning.models import find_model

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
        stated_reward=stated_reward(arguments, config),
        gigabytes=max(sizes_of(arguments)),
        prompts=prompts_here(config.data.shards),
    )
    stage = [f"stage: {arguments.zero}"] if arguments.zero else []
    offload = [f"{part}: {{device: cpu}}" for part in OFFLOADS.get(arguments.offload, [])]
    return reduce(change, (f"zero_optimization.{words}" for words in stage + offload), job)


def sizes_of(arguments: argparse.Namespace) -> list[int]:
    """Gigabytes of the GPUs that are compared."""
    if arguments.gigabytes:
        return list(arguments.gigabytes)
    return [CARDS[arguments.card].gigabytes] if arguments.card else list(GPUS)


def prompts_here(shards: str) -> dict[str, int]:
    """Prompts of each split of a local folder; none if it is elsewhere, or not built yet."""
    if not (Path(shards) / "index.json").is_file():
        return {}
    from bpgo_video.data.reader import PromptShards

    return dict(PromptShards(shards).splits)


def stated_reward(arguments: argparse.Namespace, config: Config) -> Any:
    """The rewards with the memory that the flag states; None without it. A model without a recipe has no rewards."""
    from bpgo_video.planning.rewards import RewardSize, reward_size

    if arguments.model:
        return RewardSize(int((arguments.reward_gigabytes or 0) * 1e9), 0, stated=True)
    if arguments.reward_gigabytes is None:
        return None
    size = int(arguments.reward_gigabytes * 1e9)
    return replace(reward_size(config), resting=size, offloaded=0, unknown=(), stated=True)


def rates_of_job(arguments: argparse.Namespace, job: Any) -> Any:
    """The rates that the flags ask for; `--calibrate` measures and writes them.

    Raises:
        ConfigError: --calibrate without a file, or a file without rates.
    """
    card = card_of(arguments.card, min(arguments.gigabytes) if arguments.gigabytes else None)
    rates = rates_of(card, arguments.mfu, bf16=job.zero.weight_bytes == 2, network_gbps=arguments.link_gbps)
    if arguments.calibrate:
        if arguments.rates is None:
            raise ConfigError("--calibrate measures rates for later plans; name the file that it writes with --rates")
        import torch

        from bpgo_video.planning.calibrate import calibrate

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_rates(arguments.rates, calibrate(job, rates, device))
    return rates if arguments.rates is None else with_network(read_rates(arguments.rates), arguments.link_gbps)


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
    """0 if the job fits on a GPU of one of the sizes, 1 if on none, 2 if anything is wrong, 3 if it is not known."""
    arguments, flags = parser(script).parse_known_args(recipe_as_flag(words))
    try:
        job = job_of(arguments, flags)

        from bpgo_video.planning.report import as_json, as_text, report_of

        report = report_of(job, rates_of_job(arguments, job), sizes_of(arguments), arguments.price)
    except (InputError, OSError) as error:
        return print_error(error)
    print(json.dumps(as_json(report), indent=1) if arguments.json else as_text(report))
    if not any(report.plan.fits(size) for size in report.sizes):
        return 1
    return 3 if job.reward.unknown else 0
