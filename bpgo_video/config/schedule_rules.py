"""Rules on noise levels that a recipe states: a table of messages, and whether the recipe breaks them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from bpgo_video.config.bpgo import Config
from bpgo_video.config.fields import Sigmas


def schedule_rules(config: Config) -> Mapping[str, object]:
    sampler, evaluation = config.sampler, config.evaluation
    held_out = evaluation.sigmas_or(sampler)
    inherits = "" if evaluation.sigmas or not held_out else ", or evaluation.sigmas or evaluation.shift"
    return {
        **_rules("sampler", sampler.sigmas, sampler.num_steps, sampler.shift),
        **_rules("evaluation", held_out, evaluation.num_steps, evaluation.shift, inherits),
        f"evaluation.solver is 'shipped', which has noise levels of its own, with sigmas {list(held_out)}; set "
        "evaluation.solver to 'euler' or 'adams_bashforth'": held_out and evaluation.solver == "shipped",
    }


def _rules(section: str, sigmas: Sigmas, num_steps: int, shift: float | None, otherwise: str = "") -> dict[str, object]:
    shown = f"{section}.sigmas {list(sigmas)}"
    falling = all(level > following for level, following in pairwise(sigmas))
    return {
        f"{shown} must fall from each step to the next; order them from noise to data": not falling,
        f"{shown} are {len(sigmas)} steps, but {section}.num_steps is {num_steps}; set {section}.num_steps to "
        f"{len(sigmas)}{otherwise}": sigmas and len(sigmas) != num_steps,
        f"{shown} are taken as they are, but {section}.shift is {shift}; set {section}.shift to null, or leave "
        f"{section}.sigmas out": sigmas and shift is not None,
    }
