"""What does a run keep of itself? Its whole state in checkpoints, and its weights as a model folder at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bpgo_video.checkpoints import checkpoint, resuming
from bpgo_video.checkpoints.checkpoint import Saved
from bpgo_video.checkpoints.ema_files import load_average, save_average
from bpgo_video.export.model_card import EXPORTED, CardFacts
from bpgo_video.export.pipeline_folder import export_pipeline
from bpgo_video.policies.transformers import trained_names
from bpgo_video.training.policy_session import PolicySession


def save(session: PolicySession, step: int, progress: Mapping[str, Any]) -> Saved:
    """A checkpoint of the finished step; `progress`, plain data, comes back from `resume`."""
    parts = [partial(save_average, session.ema)] if session.ema else []
    state = {"progress": progress, "code": session.code}
    return checkpoint.save(session.engine, session.config.run, step, state, session.mesh, parts)


def resume(session: PolicySession, run_dir: Path, name: str) -> dict[str, Any]:
    """Put the checkpoint `name` into the session; the run's progress by then."""
    folder = run_dir / checkpoint.FOLDER / name
    state = resuming.load(session.engine, folder, session.mesh, session.config.run.resume_optimizer)
    if session.ema:
        load_average(session.ema, folder)
    earlier = state.get("code", [])
    session.code[:] = [*earlier, *(one for one in session.code if one not in earlier[-1:])]
    return dict(state["progress"])


def export(session: PolicySession, run_dir: Path) -> None:
    """The trained weights in RUN/export, and their average, where one is kept, in RUN/export-ema."""
    names = trained_names(session.policy.folder, session.config.policy.trained)
    write = partial(export_pipeline, session.engine, session.policy, names, mesh=session.mesh)
    card = CardFacts(session.config, session.config.run.num_steps, "raw", EXPORTED, session.code)
    write(output=run_dir / "export", card=card)
    if session.ema:
        with session.ema.weights():
            write(output=run_dir / "export-ema", card=replace(card, weights="ema"))
