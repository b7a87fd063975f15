"""The command line of tools/doctor.py: build what a run stands on, examine it, and leave no trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bpgo_video import engine
from bpgo_video.cli import show_loading_once, tell
from bpgo_video.config import Config, ConfigError, check_world
from bpgo_video.config_io import load_config
from bpgo_video.data.prompt_records import ShardError
from bpgo_video.doctor import diagnose
from bpgo_video.parallel.heartbeat import Heartbeat
from bpgo_video.parallel.mesh import Mesh, make_mesh
from bpgo_video.session import build_session, cast, check_inputs
from bpgo_video.zero_files import CheckpointError


def examine_recipe(config: Config, mesh: Mesh, heartbeat: Heartbeat) -> bool:
    check_world(config, mesh.world_size)
    mesh = make_mesh(mesh.device, config.parallel.sequence)
    ds_config, shards = check_inputs(config, mesh)
    session = build_session(config, mesh, ds_config, shards)
    stream = shards.stream(
        config.data.split, config.run.seed, config.rollout.prompts_per_step, priors=session.priors.values()
    )
    prompts = next(stream)
    dtype = next(iter(session.prompts.negative.values())).dtype
    prompts = replace(prompts, conditioning=cast(prompts.conditioning, dtype))
    return diagnose(session, prompts, heartbeat)


def main(argv: Sequence[str] | None = None) -> None:
    config = load_config(argv, description="Examine a recipe before a long run; nothing is saved.")
    show_loading_once()
    try:
        mesh = engine.start_ranks()
        with Heartbeat(mesh, config.parallel.heartbeat_timeout) as heartbeat:
            healthy = examine_recipe(config, mesh, heartbeat)
    except (ConfigError, ShardError, CheckpointError, FileNotFoundError) as error:
        tell(error)
        raise SystemExit(2) from None
    engine.stop_ranks()
    raise SystemExit(0 if healthy else 1)
