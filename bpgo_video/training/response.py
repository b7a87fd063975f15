"""What a run does about alarms for reward hacking: says so, ends, or multiplies the weight of the KL term."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.mesh import Mesh, from_main
from bpgo_video.training.alarm import AlarmMemory, comparisons, watch
from bpgo_video.training.heldout import HeldoutScores

ADVICE = "take the checkpoint of that step, lower the learning rate, raise loss.kl_weight, or add a reward"


def respond(config: Config, memory: AlarmMemory, step: int, scores: HeldoutScores, mesh: Mesh) -> list[str]:
    """Sentences on the alarms of an evaluation after `step` steps, and what follows from them.

    All ranks call it, and take over the memory of rank 0.
    """
    if config.evaluation.alarm == "none":
        return []
    by_name, again = {name: values.numpy() for name, values in scores.by_name.items()}, config.evaluation.alarm == "kl"
    found = watch(memory, step, by_name, comparisons(config), again)
    found, memory.best, memory.alarms = from_main((found, memory.best, memory.alarms), mesh)
    if found and again:
        memory.kl_factor *= config.evaluation.alarm_kl_factor
    return [f"{alarm}; {_consequence(config, memory)}" for alarm in found]


def _consequence(config: Config, memory: AlarmMemory) -> str:
    if ended(config, memory):
        return "the run ends here with its results (evaluation.alarm: stop)"
    if config.evaluation.alarm == "kl":
        return f"loss.kl_weight is {raised(config, memory).loss.kl_weight:g} from here on"
    return ADVICE


def ended(config: Config, memory: AlarmMemory) -> str:
    """Why alarms end the run, in a sentence; empty if they do not."""
    if config.evaluation.alarm != "stop" or not memory.alarms:
        return ""
    step, names = min(memory.alarms.values()), ", ".join(memory.alarms)
    return (
        f"The run ended after step {step} of {config.run.num_steps}, on an alarm for {names} (evaluation.alarm: stop)."
    )


def alarm_summary(config: Config, memory: AlarmMemory) -> dict[str, Any]:
    """The fields of summary.json about alarms."""
    if config.evaluation.alarm == "none":
        return {}
    found = {"alarms": memory.alarms, "alarm_comparisons": comparisons(config), "ended": ended(config, memory) or None}
    return found if config.evaluation.rewards else {}


def raised(config: Config, memory: AlarmMemory) -> Config:
    """The recipe with loss.kl_weight as alarms have raised it."""
    return replace(config, loss=replace(config.loss, kl_weight=memory.kl_factor * config.loss.kl_weight))
