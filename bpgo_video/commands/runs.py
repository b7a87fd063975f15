"""Commands that take a recipe and run on its ranks: train, sft, priors and doctor.

Flags, the recipe and its rules are checked before torch is imported and before a launcher starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import getdoc
from pathlib import Path
from typing import Any

from bpgo_video.cli import become_launcher, help_of, print_error, print_note, split_ranks, typed
from bpgo_video.config.bpgo import Config
from bpgo_video.config.command_line import load_recipe
from bpgo_video.config.deepspeed import read_ds_config
from bpgo_video.config.reading import ds_config_file
from bpgo_video.config.rules import OWNER, check_free, check_name, check_world
from bpgo_video.config.sft import Recipe
from bpgo_video.training.lease import refuse_owned


def train(words: Sequence[str], script: str | None = None) -> int:
    """Post-train a video diffusion policy with BPGO on rewards, or with flow matching on videos, as the recipe says.

        bpgo-video train tiny_wan_bpgo --ranks 2
        bpgo-video train my_recipe.yaml --run.dir runs/mine --run.resume auto
        deepspeed --hostfile HOSTS --module bpgo_video.train --config my_recipe.yaml

    Writes RUN/metrics.jsonl during training, RUN/report.html, sample videos and the trained model in RUN/export. To
    continue a stopped run, add --run.resume auto. For several nodes, see docs/multi_node.md.
    """
    return run_recipe(checked_recipe(train, words, script))


def sft(words: Sequence[str], script: str | None = None) -> int:
    """Warm-start a video diffusion policy by flow matching on captioned videos; `train` for recipes of kind sft only.

        bpgo-video videos build --input VIDEOS --output runs/clips --policy FOLDER --num-frames 81 ...
        bpgo-video sft my_sft.yaml --run.dir runs/warm --ranks 8

    The trained model is in RUN/export. Start BPGO from it with --policy.folder runs/warm/export.
    """
    return run_recipe(checked_recipe(sft, words, script, kind="sft"))


def priors(words: Sequence[str], script: str | None = None) -> int:
    """Measure the prior of each prompt of a run: the rewards that the starting policy earns on it, before training.

        bpgo-video priors tiny_wan_bpgo --ranks 2
        bpgo-video priors my_recipe.yaml --ranks 8 --prior.samples 16
        deepspeed --hostfile HOSTS --module bpgo_video priors --config my_recipe.yaml

    Samples `prior.samples` videos for each prompt that the run will visit, or with `--prior.prompts all` for each of
    `data.split`, as training samples them, scores them with its rewards, and writes SHARDS/priors/REWARD.json: anchors,
    the scale s_ref (pooled within-group standard deviation), and the settings that they were measured with. Anchors of
    the same settings stay, so repeat the command to continue an interrupted measurement, or for a longer run; after a
    change of the policy, the sampler, the video or the rewards it measures all again.
    """
    config = checked_recipe(priors, words, script, kind="bpgo")
    from bpgo_video.distributed.mesh import make_mesh
    from bpgo_video.training.priors import estimate_priors

    with ranks_of(config) as (mesh, heartbeat):
        check_world(config, mesh.world_size)
        mesh = make_mesh(mesh.device, config.parallel.sequence)
        heartbeat.enter("priors")
        estimate_priors(config, mesh, heartbeat)
    return 0


def doctor(words: Sequence[str], script: str | None = None) -> int:
    """Check a recipe on its own ranks, in minutes, before a long run.

        bpgo-video doctor tiny_wan_bpgo --ranks 2
        bpgo-video doctor my_recipe.yaml --ranks 8 --policy.gradient-checkpointing
        deepspeed --hostfile HOSTS --module bpgo_video doctor --config my_recipe.yaml

    Checks in this order: the velocity equals that of the folder's transformer in fp32; the ODE rollout equals
    diffusers' sampling loop; rewards differ between samples of a prompt; replay gives a ratio of 1; the gradient flows;
    time and memory of a step. Ends with the command to run next. Takes every flag of training, reads the same inputs,
    and saves nothing. Exit code: 0 if every check passes, 1 if one fails, 2 if the inputs are wrong.
    """
    config = checked_recipe(doctor, words, script, kind="bpgo")
    from bpgo_video.distributed.mesh import make_mesh
    from bpgo_video.training.doctor import diagnose
    from bpgo_video.training.inputs import check_inputs
    from bpgo_video.training.session import build_session

    with ranks_of(config) as (mesh, heartbeat):
        check_world(config, mesh.world_size)
        mesh = make_mesh(mesh.device, config.parallel.sequence)
        session = build_session(config, mesh, *check_inputs(config, mesh))
        prompts = next(session.batches())
        healthy = diagnose(session, prompts, heartbeat)
        if mesh.is_main:
            name, when = ("train", "Next") if healthy else ("doctor", "Then repeat")
            print(f"{when}: {typed(name, split_ranks(words)[1])}")
    return 0 if healthy else 1


def checked_recipe(
    command: Callable[..., int], words: Sequence[str], script: str | None, kind: str | None = None
) -> Any:
    """The recipe of a command line. With --ranks N this process becomes the launcher once the recipe is right.

    Args:
        command: one of this file; its docstring is the help text.
        kind: of the recipes that the command takes; None takes all.
    """
    ranks, rest = split_ranks(words)
    report = print_note if ranks is None else lambda _: None  # the ranks that start will print it
    recipe = load_recipe(rest, kind=kind, report=report, **help_of(command.__name__, getdoc(command), script))
    restarts = recipe.run.max_restarts if command in (train, sft) else 0
    try:
        read_ds_config(str(ds_config_file(recipe.deepspeed)))
        if command in (train, sft) and "RANK" not in os.environ:  # ranks see what rank 0 may have begun
            check_name(Path(recipe.run.dir), "run.dir", "name another folder with --run.dir")
            refuse_owned(Path(recipe.run.dir) / OWNER)
            check_free(recipe.run)
        if ranks is not None:
            check_world(recipe, ranks)
            become_launcher(command.__name__, ranks, rest, restarts, recipe.run.dir)
        if restarts and "RANK" not in os.environ:
            print_note(f"run.max_restarts is {restarts}, but only ranks of --ranks N are started again")
    except ValueError as error:
        raise SystemExit(print_error(error)) from None
    return recipe


def run_recipe(recipe: Recipe) -> int:
    """Train with the trainer of the recipe's kind."""
    from bpgo_video.training import rl, sft
    from bpgo_video.training.loop import launched

    trainers: dict[str, Callable[[Any], object]] = {"bpgo": rl.train, "sft": sft.train}
    with launched():
        trainers[recipe.recipe](recipe)
    return 0


@contextmanager
def ranks_of(config: Config) -> Iterator[tuple[Any, Any]]:
    """This rank among the others, with a heartbeat. An error in its inputs ends the command with exit code 2."""
    from bpgo_video.distributed import process_group
    from bpgo_video.distributed.heartbeat import Heartbeat
    from bpgo_video.training.loop import INPUT_ERRORS, launched

    with launched():
        mesh = process_group.start_ranks()
        with Heartbeat(mesh, config.parallel.heartbeat_timeout, expected=INPUT_ERRORS) as heartbeat:
            yield mesh, heartbeat
