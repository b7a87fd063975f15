"""May a run use its folder? It is never overwritten, continued by the same settings only, and seen by every rank."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bpgo_video.atomic import atomic_file
from bpgo_video.config.bpgo import Config, ConfigError, RewardConfig
from bpgo_video.config.reading import read_recipe, to_yaml
from bpgo_video.config.sft import Recipe
from bpgo_video.distributed import checkpoint
from bpgo_video.distributed.agreement import all_or_none, from_main
from bpgo_video.distributed.mesh import Mesh

SETTINGS = "config.yaml"
PLACES = {"worker": {"python"}, "remote": {"url", "token_env"}}  # options that say where a model is
PATIENCE = 60.0  # seconds; an NFS client may remember for as long that a name was not there (acdirmax)


def check_run_dir(config: Recipe) -> None:
    """Whether this run may use its folder; nothing is written yet.

    Raises:
        ConfigError: it holds a run already that was not asked to go on, or one of other settings.
    """
    run_dir = Path(config.run.dir)
    if run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= {SETTINGS}:
        return  # empty, or left by a run that ended before it had a policy
    if run_dir.is_dir() and config.run.resume == "never":
        raise ConfigError(
            f"run.dir {str(run_dir)!r} exists and is never overwritten; continue it with --run.resume auto, or name "
            "another folder with --run.dir"
        )
    if (run_dir / SETTINGS).is_file():
        check_same_run(read_recipe(run_dir / SETTINGS), config)


def open_run_dir(config: Recipe, mesh: Mesh) -> str | None:
    """Make the run's folder and keep the resolved configuration in it; the checkpoint to continue from, if any.

    Raises:
        ConfigError: a rank does not see the folder, or cannot write to it.
    """
    run_dir = Path(config.run.dir)
    mesh.barrier()  # every rank has looked before the main one writes
    check_shared(run_dir, mesh)
    newest = None
    with all_or_none(mesh):
        if mesh.is_main:
            checkpoint.clear_leftovers(run_dir)
            with atomic_file(run_dir / SETTINGS) as path:
                path.write_text(to_yaml(config), "utf-8")
            newest = checkpoint.newest(run_dir)
    return from_main(newest, mesh)  # a network file system may show another rank an older state


def check_shared(run_dir: Path, mesh: Mesh, patience: float = PATIENCE) -> None:
    """Every rank sees the folder that rank 0 makes and may write to it: each writes a part of every checkpoint.

    Raises:
        ConfigError: names the rank and host that does not; the folder is removed again if nothing else is in it.
    """
    token = run_dir / f".seen-by-every-rank-{from_main(secrets.token_hex(8), mesh)}"
    try:
        with all_or_none(mesh):
            if mesh.is_main:
                make(token)
        with all_or_none(mesh):
            if not appears(token, patience):
                raise ConfigError(
                    f"run.dir {str(run_dir)!r} is not the folder that rank 0 has under this name: every rank writes "
                    "its part of a checkpoint there; put it on storage that all nodes share, with --run.dir"
                )
            own = token.with_name(f"{token.name}-{mesh.rank}")
            make(own)  # a file system's server may refuse what the mode of the folder allows
            own.unlink()
    except ConfigError:
        if mesh.is_main:
            with suppress(OSError):  # not there, not empty, or not to be written to
                token.unlink(missing_ok=True)
                run_dir.rmdir()
        raise
    if mesh.is_main:
        token.unlink()


def make(token: Path) -> None:
    """A file in the run's folder, which is made where it is not there yet."""
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise ConfigError(
            f"run.dir {str(token.parent)!r} cannot be written to ({error.strerror}: {error.filename}); "
            "every rank must write there, or name another folder with --run.dir"
        ) from error


def appears(path: Path, patience: float) -> bool:
    """Whether a file is there within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        if path.parent.parent.is_dir():
            os.listdir(path.parent.parent)  # makes a network file system look again
    return True


def check_same_run(saved: Recipe, config: Recipe) -> None:
    """A resumed run may change how long it runs, how often it saves, its sharding, its timeouts, and when and where
    things that come out the same are done: nothing that it computes.
    """
    if saved.recipe != config.recipe:
        raise ConfigError(
            f"run.dir {config.run.dir!r} holds a run of kind {saved.recipe!r}, this one is {config.recipe!r}; start a "
            "new run with --run.dir"
        )
    before, after = vars(computed(saved)), vars(computed(config))
    changed = [name for name in after if name not in ("wandb", "run", "deepspeed") and before[name] != after[name]]
    if saved.run.seed != config.run.seed:
        changed.append("run.seed")
    if config.optim.schedule != "constant" and saved.run.num_steps != config.run.num_steps:
        changed.append(f"run.num_steps (where the {config.optim.schedule} schedule ends)")
    if changed:
        raise ConfigError(
            f"run.dir {config.run.dir!r} was started with other {', '.join(changed)} settings (see its config.yaml); "
            "resume with the same ones, or start a new run with --run.dir"
        )


def computed(config: Recipe) -> Recipe:
    """The settings that the run's numbers depend on, the others at a common value."""
    config = replace(config, parallel=replace(config.parallel, heartbeat_timeout=1.0))
    return OWN[config.recipe](config)


def scored(config: Config) -> Config:
    """What is bpgo's own: when videos are scored, where trajectories rest, and where the rewards' models are."""
    return replace(
        config,
        rollout=replace(config.rollout, score_ahead=0, offload_trajectories=False),
        rewards=without_places(config.rewards),
        evaluation=replace(config.evaluation, rewards=without_places(config.evaluation.rewards)),
    )


OWN: dict[str, Callable[[Any], Recipe]] = {"bpgo": scored, "sft": lambda config: config}


def without_places(rewards: Mapping[str, RewardConfig]) -> dict[str, RewardConfig]:
    """Rewards as they score, without where their models are and how long that may take."""

    def places(reward: RewardConfig) -> set[str]:
        return PLACES.get(reward.model, set())

    return {
        name: replace(
            reward,
            timeout=1.0,
            offload=False,
            options={key: value for key, value in reward.options.items() if key not in places(reward)},
        )
        for name, reward in rewards.items()
    }
