"""What a run on rewards leaves: its progress, summary.json, samples.json, the report and the table on the screen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bpgo_video.atomic import write_json
from bpgo_video.config.bpgo import Config
from bpgo_video.learner.priors import RunningRewards
from bpgo_video.learner.trust import ICCHistory
from bpgo_video.statistics import corrected, effect
from bpgo_video.training.heldout import HeldoutScores, Scores, shown_rows, stderr
from bpgo_video.training.metrics import METRICS_FILE, Cell, read_metrics
from bpgo_video.training.report import write_report
from bpgo_video.training.session import Session
from bpgo_video.training.summary import diagnose, summary_table

PHASES = ("rollout", "reward", "update")


@dataclass
class Progress:
    """What a run has done; with the weights, all that a checkpoint holds."""

    step: int = 0
    position: int = 0
    videos_generated: int = 0
    max_ratio_error_first_update: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("total", *PHASES), 0.0))
    heldout_before: dict[str, list[list[float]]] | None = None
    frames_before: dict[str, list[list[float]]] = field(default_factory=dict)
    running_rewards: RunningRewards = field(default_factory=dict)
    agreements: ICCHistory = field(default_factory=dict)


def shown_prompts(session: Session) -> list[int]:
    """The rows of the held-out prompts whose first sample is shown."""
    heldout, config = session.prompts.heldout, session.config.evaluation
    if heldout is None:
        return []
    return [
        row // config.samples_per_prompt for row in shown_rows(len(heldout), config.samples_per_prompt, config.videos)
    ]


def shown_videos(session: Session, folder: Path, scores: HeldoutScores) -> list[tuple[Path, str]]:
    """The held-out videos that are shown, each with its prompt and its scores."""
    heldout = session.prompts.heldout
    return [
        (folder / f"{index:03d}.mp4", caption(heldout.texts[row], row, scores))
        for index, row in enumerate(shown_prompts(session))
        if heldout is not None
    ]


def caption(prompt: str, row: int, scores: HeldoutScores) -> str:
    """The prompt of this row, its first sample's scores, and those of frames where a reward has them."""
    told = [prompt]
    for name, found in scores.by_name.items():
        frames = scores.frames[name].values[row].tolist() if name in scores.frames else []
        by_frame = f" ({' '.join(f'{score:.3g}' for score in frames)})" if frames else ""
        told.append(f"{name}: {float(found[row, 0]):.3g}{by_frame}")
    return " | ".join(told)


def shown_table(session: Session, progress: Progress, after: HeldoutScores, samples: Path) -> list[dict[str, Cell]]:
    """Videos and scores before the first step and after the last: a row for each prompt, of its first sample."""
    heldout, before = session.prompts.heldout, progress.heldout_before
    if heldout is None or before is None:
        return []
    return [
        {
            "prompt": heldout.texts[row],
            "before": samples / "before" / f"{index:03d}.mp4",
            "after": samples / "after" / f"{index:03d}.mp4",
            **{f"{name} before": scores[row][0] for name, scores in before.items()},
            **{f"{name} after": float(scores[row, 0]) for name, scores in after.by_name.items()},
        }
        for index, row in enumerate(shown_prompts(session))
    ]


def frame_lines(session: Session, step: int, scores: HeldoutScores) -> list[dict[str, Any]]:
    """A line of `samples/frame_scores.jsonl` for each shown video and reward."""
    heldout = session.prompts.heldout
    return [
        {
            "step": step,
            "prompt": heldout.texts[row],
            "reward": name,
            "times": [] if found.times is None else found.times.tolist(),
            "scores": found.values[row].tolist(),
        }
        for row in shown_prompts(session)
        for name, found in scores.frames.items()
        if heldout is not None
    ]


def heldout_videos(session: Session) -> int:
    heldout = session.prompts.heldout
    return 0 if heldout is None else len(heldout) * session.config.evaluation.samples_per_prompt


def summarise(session: Session, progress: Progress, after: HeldoutScores | None) -> dict[str, Any]:
    """The fields of summary.json; held-out ones by the first reward of `evaluation.rewards`."""
    config = session.config
    summary: dict[str, Any] = {
        "steps": progress.step,
        "world_size": session.mesh.world_size,
        "zero_stage": session.engine.stage,
        "algorithm": config.algorithm,
        "seed": config.run.seed,
        "heldout_before": None,
        "heldout_after": None,
        "videos_generated": progress.videos_generated,
        "seconds": {name: round(seconds, 3) for name, seconds in progress.seconds.items()},
        "max_ratio_error_first_update": progress.max_ratio_error_first_update,
    }
    if after is not None and progress.heldout_before is not None:
        name = next(iter(config.evaluation.rewards))
        first, last = torch.tensor(progress.heldout_before[name]), after.by_name[name]
        summary |= {
            "heldout_reward": name,
            "heldout_before": float(first.mean()),
            "heldout_after": float(last.mean()),
            "heldout_prompts": last.shape[0],
            "heldout_videos": last.numel(),
        }
        if last.numel() > 1:  # of one video no error is known
            scores = {"before": first, "after": last, "difference": last - first}
            summary |= {f"heldout_{when}_stderr": stderr(values) for when, values in scores.items()}
        summary |= heldout_test(first, last, config)
    return summary


def heldout_test(first: Scores, last: Scores, config: Config) -> dict[str, Any]:
    """What the change shows over prompts, corrected as in a comparison of all measures (evaluation/comparing/)."""
    trained = {name for name, reward in config.rewards.items() if reward.weight > 0}
    names = {*config.evaluation.rewards, *trained}
    videos = (config.video.num_frames > 1) + (config.evaluation.samples_per_prompt > 1)
    measures = len(names) + (len(names & config.rewards.keys()) > 1) + videos
    found = corrected(effect(first.cpu().numpy(), last.cpu().numpy()), measures)
    return {
        "heldout_interval": None if found.low is None else [found.low, found.high],
        "heldout_p_value": found.p_adjusted,
        "heldout_measures": measures,
        "heldout_shown": found.shown,
    }


def write_results(
    run_dir: Path, summary: dict[str, Any], session: Session, progress: Progress, after: HeldoutScores | None
) -> None:
    """summary.json, samples.json, report.html, and on the screen the table with what to know about the run."""
    summary = {**summary, "diagnosis": diagnose(read_metrics(run_dir / METRICS_FILE), summary)}
    write_json(run_dir / "summary.json", summary)
    heldout = session.prompts.heldout
    if after is not None and progress.heldout_before is not None and heldout is not None:
        name, config = summary["heldout_reward"], session.config
        shown = [
            {
                "index": index,
                "prompt": heldout.texts[row],
                "seed": config.run.seed,
                "score_before": progress.heldout_before[name][row][0],
                "score_after": float(after.by_name[name][row, 0]),
                "frames": {
                    reward: {
                        "times": [] if found.times is None else found.times.tolist(),
                        "before": progress.frames_before.get(reward, {row: []})[row],
                        "after": found.values[row].tolist(),
                    }
                    for reward, found in after.frames.items()
                },
            }
            for index, row in enumerate(shown_prompts(session))
        ]
        write_json(run_dir / "samples" / "samples.json", shown)
    write_report(run_dir)
    written = ["report.html", "summary.json", "metrics.jsonl", "config.yaml", "samples", "checkpoints", "export"]
    if session.ema:
        written.append("export-ema")
    print(summary_table(summary, {name: run_dir / name for name in written}))
