"""What does a run keep of itself? Its whole state in checkpoints, and its weights as a model folder at the end."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from bpgo_video import checkpoint, resuming
from bpgo_video.checkpoint import Saved
from bpgo_video.ema_files import load_average, save_average
from bpgo_video.export import export_pipeline
from bpgo_video.model_card import EXPORTED, CardFacts
from bpgo_video.policies.transformers import trained_names
from bpgo_video.results import Progress
from bpgo_video.session import Session


def save(session: Session, progress: Progress) -> Saved:
    """A checkpoint of the finished step."""
    parts = [partial(save_average, session.ema)] if session.ema else []
    state = {"progress": vars(progress)}
    return checkpoint.save(session.engine, session.config.run, progress.step, state, session.mesh, parts)


def resume(session: Session, run_dir: Path, name: str) -> Progress:
    """Put the checkpoint `name` into the session; what the run had done by then."""
    folder = run_dir / checkpoint.FOLDER / name
    state = resuming.load(session.engine, folder, session.mesh, session.config.run.resume_optimizer)
    if session.ema:
        load_average(session.ema, folder)
    return Progress(**state["progress"])


def export(session: Session, run_dir: Path) -> None:
    """The trained weights in RUN/export, and their average, where one is kept, in RUN/export-ema."""
    names = trained_names(session.policy.folder, session.config.policy.trained)
    write = partial(export_pipeline, session.engine, session.policy, names, mesh=session.mesh)
    card = CardFacts(session.config, session.config.run.num_steps, "raw", EXPORTED)
    write(output=run_dir / "export", card=card)
    if session.ema:
        with session.ema.weights():
            write(output=run_dir / "export-ema", card=replace(card, weights="ema"))
