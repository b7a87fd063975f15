"""May a run use its folder? It is never overwritten, and continued only by a run of the same settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bpgo_video import checkpoint
from bpgo_video.config import Config, ConfigError
from bpgo_video.config_io import read_yaml, to_yaml
from bpgo_video.data.atomic import atomic_file
from bpgo_video.parallel.mesh import Mesh


def check_run_dir(config: Config) -> None:
    """Whether this run may use its folder; nothing is written yet.

    Raises:
        ConfigError: it holds a run already that was not asked to go on, or one of other settings.
    """
    run_dir = Path(config.run.dir)
    if run_dir.is_dir() and any(run_dir.iterdir()) and config.run.resume == "never":
        raise ConfigError(
            f"run.dir {str(run_dir)!r} exists and is never overwritten; continue it with --run.resume auto, or name "
            "another folder with --run.dir"
        )
    if (run_dir / "config.yaml").is_file():
        check_same_run(read_yaml(run_dir / "config.yaml"), config)


def open_run_dir(config: Config, mesh: Mesh) -> str | None:
    """Make the run's folder and keep the resolved configuration in it; the checkpoint to continue from, if any."""
    mesh.barrier()  # every rank has looked before the main one writes
    if mesh.is_main:
        with atomic_file(Path(config.run.dir) / "config.yaml") as path:
            path.write_text(to_yaml(config))
    mesh.barrier()
    return checkpoint.newest(Path(config.run.dir))


def check_same_run(saved: Config, config: Config) -> None:
    """A resumed run may change how long it runs, how often it saves and its timeout, nothing that it computes."""
    saved = replace(saved, parallel=replace(saved.parallel, heartbeat_timeout=config.parallel.heartbeat_timeout))
    free = ("wandb", "run")
    changed = [name for name in vars(config) if name not in free and vars(saved)[name] != vars(config)[name]]
    if saved.run.seed != config.run.seed:
        changed.append("run.seed")
    if config.optim.schedule != "constant" and saved.run.num_steps != config.run.num_steps:
        changed.append(f"run.num_steps (where the {config.optim.schedule} schedule ends)")
    if changed:
        raise ConfigError(
            f"run.dir {config.run.dir!r} was started with other {', '.join(changed)} settings (see its config.yaml); "
            "resume with the same ones, or start a new run with --run.dir"
        )
