"""The command line of tools/doctor.py: build what a run stands on, examine it, and leave no trace."""

from __future__ import annotations

from collections.abc import Sequence

from bpgo_video.config.bpgo import Config
from bpgo_video.config.command_line import load_config
from bpgo_video.config.rules import check_world
from bpgo_video.parallel.heartbeat import Heartbeat
from bpgo_video.parallel.mesh import Mesh, make_mesh
from bpgo_video.training.doctor import diagnose
from bpgo_video.training.launch import launched
from bpgo_video.training.session import build_session, check_inputs
from bpgo_video.zero import engine


def examine_recipe(config: Config, mesh: Mesh, heartbeat: Heartbeat) -> bool:
    check_world(config, mesh.world_size)
    mesh = make_mesh(mesh.device, config.parallel.sequence)
    ds_config, shards = check_inputs(config, mesh)
    session = build_session(config, mesh, ds_config, shards)
    prompts, _ = next(session.batches())
    return diagnose(session, prompts, heartbeat)


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    config = load_config(argv, description)
    with launched():
        mesh = engine.start_ranks()
        with Heartbeat(mesh, config.parallel.heartbeat_timeout) as heartbeat:
            healthy = examine_recipe(config, mesh, heartbeat)
    raise SystemExit(0 if healthy else 1)
