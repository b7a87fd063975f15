"""Which settings go with `rollout.sample_ahead`."""

from __future__ import annotations

from collections.abc import Mapping

from bpgo_video.config.bpgo import Config

SCORES_IMAGES = ("first_frame", "first_frame_centred")


def ahead_rules(config: Config) -> Mapping[str, object]:
    """What is wrong -> whether it is so; nothing without `rollout.sample_ahead`."""
    run, every, kind = config.run, config.evaluation.every, config.prior.kind
    if not config.rollout.sample_ahead:
        return {}
    offloaded = next((name for name, reward in config.rewards.items() if reward.offload), None)
    return {
        f"run.save_minutes is {run.save_minutes:g} with rollout.sample_ahead: after a checkpoint the new weights "
        "sample, so that the clock would change the run's numbers; set it to 0, and choose run.save_every": (
            run.save_minutes > 0
        ),
        f"run.save_every is {run.save_every} and evaluation.every is {every} with rollout.sample_ahead: nothing is "
        "sampled ahead of a checkpoint or an evaluation, and they follow every step; raise them": (
            1 in (run.save_every, every)
        ),
        "rollout.score_ahead is 0, which scores in line, with rollout.sample_ahead, which scores during updates; set "
        "one of them to its default": config.rollout.score_ahead == 0,
        f"rewards.{offloaded}.offload is true with rollout.sample_ahead, whose rewards also score during updates; set "
        "one of them to false": offloaded is not None,
        f"prior.kind is {kind!r} with rollout.sample_ahead: reward models would score images and, in a thread, videos "
        "at the same time; set it to 'reference', or rollout.sample_ahead to false": kind in SCORES_IMAGES,
    }
