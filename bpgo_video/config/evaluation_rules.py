"""Rules on held-out evaluation; a table as in `rules.py`, of messages and whether the recipe breaks them."""

from __future__ import annotations

from collections.abc import Mapping

from bpgo_video.config.bpgo import Config


def alarm_rules(config: Config) -> Mapping[str, object]:
    evaluation, alarm = config.evaluation, config.evaluation.alarm
    acts = alarm in ("stop", "kl")
    return {
        f"evaluation.alarm is {alarm!r} with evaluation.every = {evaluation.every} and {len(evaluation.rewards)} "
        "held-out rewards: the alarm compares evaluations during the run; set evaluation.every and evaluation.rewards, "
        "or alarm to 'warn'": acts and (evaluation.every == 0 or not evaluation.rewards),
        "evaluation.alarm is 'kl' with loss.kl_weight = 0, which has no reference policy and nothing to multiply; set "
        "loss.kl_weight, or alarm to 'stop'": alarm == "kl" and config.loss.kl_weight == 0,
    }
