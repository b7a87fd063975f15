"""A run's folder: it is never overwritten, continued only with the same settings, and shared by all ranks."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bpgo_video.config.bpgo import Config, ConfigError, RewardConfig
from bpgo_video.config.reading import read_recipe, to_yaml
from bpgo_video.config.rules import OWNER, SETTINGS, check_free
from bpgo_video.config.sft import Recipe
from bpgo_video.distributed import checkpoint, resume
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_main
from bpgo_video.files import atomic_file
from bpgo_video.training.lease import Lease, refuse_owned

LOCATION_OPTIONS = {"worker": {"python"}, "remote": {"url", "token_env"}}  # reward options that only locate a model
FREE_SECTIONS = ("trackers", "wandb", "trackio", "run", "deepspeed")  # may change, or are checked one by one
PATIENCE = 60.0  # seconds; an NFS client may cache the absence of a file for this long (acdirmax)


def check_run_dir(config: Recipe) -> None:
    """Check that this run may use its folder; writes nothing.

    Raises:
        ConfigError: it holds a run, and this one does not resume it or has other settings.
        OwnedError: another launch on this machine writes to it.
    """
    run_dir = Path(config.run.dir)
    refuse_owned(run_dir / OWNER)
    if check_free(config.run) and (run_dir / SETTINGS).is_file():
        check_same_run(read_recipe(run_dir / SETTINGS), config)


def check_same_run(saved: Recipe, config: Recipe) -> None:
    """Check that a run resumes with the settings that its numbers depend on.

    Length, save interval, sharding, timeouts, where and when rewards are computed, and whether an alarm stops the run
    may change.

    Raises:
        ConfigError: names the changed settings.
    """
    if saved.recipe != config.recipe:
        raise ConfigError(
            f"run.dir {config.run.dir!r} holds a run of kind {saved.recipe!r}, this one is {config.recipe!r}; start a "
            "new run with --run.dir"
        )
    before, after = vars(numeric_settings(saved)), vars(numeric_settings(config))
    changed = [name for name in after if name not in FREE_SECTIONS and before[name] != after[name]]
    if saved.run.seed != config.run.seed:
        changed.append("run.seed")
    if config.optim.schedule != "constant" and saved.run.num_steps != config.run.num_steps:
        changed.append(f"run.num_steps (where the {config.optim.schedule} schedule ends)")
    if isinstance(config, Config) and config.rollout.sample_ahead and saved.run.save_every != config.run.save_every:
        changed.append("run.save_every (after which rollout.sample_ahead samples with the new weights)")
    if changed:
        raise ConfigError(
            f"run.dir {config.run.dir!r} was started with other {', '.join(changed)} settings (see its config.yaml); "
            "resume with the same ones, or start a new run with --run.dir"
        )


def numeric_settings(config: Recipe) -> Recipe:
    """The settings that a run's numbers depend on; all others are set to a common value."""
    config = replace(config, parallel=replace(config.parallel, heartbeat_timeout=1.0))
    if not isinstance(config, Config):
        return config
    evaluation = replace(config.evaluation, rewards=_without_locations(config.evaluation.rewards))
    if evaluation.alarm != "kl":  # the others change no number
        evaluation = replace(evaluation, alarm="warn", alarm_kl_factor=1.0)
    return replace(
        config,
        rollout=replace(config.rollout, score_ahead=0, offload_trajectories=False),
        rewards=_without_locations(config.rewards),
        evaluation=evaluation,
    )


def _without_locations(rewards: Mapping[str, RewardConfig]) -> dict[str, RewardConfig]:
    """Rewards without the location of their models and their timeouts."""
    found = {}
    for name, reward in rewards.items():
        locations = LOCATION_OPTIONS.get(reward.model, set())
        options = {key: value for key, value in reward.options.items() if key not in locations}
        found[name] = replace(reward, timeout=1.0, offload=False, options=options)
    return found


def open_run_dir(config: Recipe, mesh: Mesh, lease: Lease) -> Path | None:
    """Create the run's folder with its resolved configuration; rank 0 acquires the lease on it.

    Returns:
        The newest intact checkpoint, or None.

    Raises:
        ConfigError: a rank does not see the folder or cannot write to it.
        OwnedError: another launch writes to it.
        CheckpointError: all checkpoints are damaged.
    """
    run_dir = Path(config.run.dir)
    mesh.barrier()  # every rank has checked the folder before rank 0 writes
    check_shared(run_dir, mesh)
    with all_or_none(mesh):
        if mesh.is_main:
            lease.acquire()
            checkpoint.clear_leftovers(run_dir)
            with atomic_file(run_dir / SETTINGS) as path:
                path.write_text(to_yaml(config), "utf-8")
    return resume.newest_intact(run_dir, mesh)


def check_shared(run_dir: Path, mesh: Mesh, patience: float = PATIENCE) -> None:
    """Check that every rank sees the folder that rank 0 creates and may write to it, as checkpoints need.

    Raises:
        ConfigError: names the rank and host that does not; a folder with nothing else in it is removed again.
    """
    token = run_dir / f".seen-by-every-rank-{from_main(secrets.token_hex(8), mesh)}"
    try:
        with all_or_none(mesh):
            if mesh.is_main:
                _touch(token)
        with all_or_none(mesh):
            if not _appears(token, patience):
                raise ConfigError(
                    f"run.dir {str(run_dir)!r} is not the folder that rank 0 has under this name: every rank writes "
                    "its part of a checkpoint there; put it on storage that all nodes share, with --run.dir"
                )
            rank_token = token.with_name(f"{token.name}-{mesh.rank}")
            _touch(rank_token)  # a file server may refuse what the folder's mode allows
            rank_token.unlink()
    except ConfigError:
        if mesh.is_main:
            with suppress(OSError):  # not there, not empty, or not writable
                token.unlink(missing_ok=True)
                run_dir.rmdir()
        raise
    if mesh.is_main:
        token.unlink()


def _touch(token: Path) -> None:
    """Create a file in the run's folder, and the folder if needed."""
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise ConfigError(
            f"run.dir {str(token.parent)!r} cannot be written to ({error.strerror}: {error.filename}); every rank must "
            "write there: change its permissions, or name another folder with --run.dir"
        ) from error


def _appears(path: Path, patience: float) -> bool:
    """Whether a file exists within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        if path.parent.parent.is_dir():
            os.listdir(path.parent.parent)  # makes a network file system refresh its cache
    return True
