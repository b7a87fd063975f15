"""What each objective needs of a recipe's other settings; tables as in `rules.py`."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from bpgo_video.config.bpgo import Config
from bpgo_video.config.learner import AGAINST_OLD, AGAINST_REFERENCE, AGREEMENTS, FINAL_VIDEOS

REPLAYS = "learns from final videos and replays no transition"
LEFT_OUT = "turns advantages into probabilities: samples left out would count as average ones"
ON_FINAL_VIDEOS = {  # what an objective on final videos needs, and why
    "rollout.same_start": (False, "samples by the ODE: all samples of a prompt would be equal"),
    "rollout.branches": ((), "has no trained steps at which samples could split"),
    "rollout.sample_ahead": (False, "records no log-prob of the policy that sampled"),
    "loss.step_weights": ("none", REPLAYS),
    "loss.ratio": ("plain", REPLAYS),
    "loss.trust_region": ("clip", REPLAYS),
    "loss.kl_weight": (0.0, "uses no reference policy"),
    "credit.kind": ("video", "has no log-prob of frames"),
}
LEARNS_PAIRS = "learns which sample of a pair is better and uses no size of an advantage"
PAIRS = {
    **ON_FINAL_VIDEOS,
    "loss.kl_weight": (0.0, "stays close to its reference policy by loss.dpo_beta"),
    "sampler.share_steps": ("batch", "trains pairs of several prompts together, at one noise level"),
    "advantage.normalise": ("group", "takes p from z-scores within groups"),
    "advantage.combine": ("weighted_sum", "takes p from the weighted sum of the rewards"),
    "advantage.best_of": (None, "has loss.dpo_pairs instead"),
    "advantage.drop_zero_std": (False, LEARNS_PAIRS),
    "bpgo.zeta": (0.0, LEARNS_PAIRS),
    "bpgo.match_rms": (False, LEARNS_PAIRS),
}
LEARNS_SIGNS = "learns on which side of its group's mean a sample is and uses no size of an advantage"
SIGNS = {
    **ON_FINAL_VIDEOS,
    "loss.kl_weight": (0.0, "stays close to its reference policy by loss.dpo_beta"),
    "advantage.best_of": (None, LEARNS_SIGNS),
    "advantage.drop_zero_std": (False, LEARNS_SIGNS),
    "bpgo.zeta": (0.0, LEARNS_SIGNS),
    "bpgo.match_rms": (False, LEARNS_SIGNS),
}
ALL_OF_A_STEP = "differentiates the steps as the rollout took them"
OWN_GRADIENT = "follows the gradient of the rewards and uses no advantage"
DIFFERENTIATED = {
    **ON_FINAL_VIDEOS,
    "rollout.sample_ahead": (False, "scores in the update, when the next videos would be scored, too"),
    "rollout.guidance_every": (1, ALL_OF_A_STEP),
    "rollout.attention_backend": (None, ALL_OF_A_STEP),
    "sampler.solver": ("euler", "differentiates each step on its own"),
    "optim.updates_per_rollout": (1, "has one gradient for a rollout"),
    "advantage.best_of": (None, OWN_GRADIENT),
    "advantage.drop_zero_std": (False, OWN_GRADIENT),
    "bpgo.zeta": (0.0, OWN_GRADIENT),
    "bpgo.alpha": (0.0, OWN_GRADIENT),
    "bpgo.match_rms": (False, OWN_GRADIENT),
    "policy.frozen_rest_on": ("device", "needs the VAE during the update"),
}
OBJECTIVES: dict[str, dict[str, tuple[Any, str]]] = {
    "awm": ON_FINAL_VIDEOS,
    "nft": {**ON_FINAL_VIDEOS, "advantage.best_of": (None, LEFT_OUT), "advantage.drop_zero_std": (False, LEFT_OUT)},
    "dpo": PAIRS,
    "kto": SIGNS,
    "draft": DIFFERENTIATED,
}
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {  # taken while a rule is broken
    **{name: {key: row[0] for key, row in needs.items()} for name, needs in OBJECTIVES.items()},
    "dpo": {**{key: row[0] for key, row in PAIRS.items()}, "bpgo.trust": "none"},
}


def objective_rules(config: Config) -> Mapping[str, object]:
    loss, segment, old = config.loss, config.credit.kind == "segment", config.rollout.sample_ahead
    updates, group = config.optim.updates_per_rollout, config.rollout.group_size
    pulls, dpo = loss.uses_reference, loss.objective == "dpo"
    by_level = [
        name for name, bpgo in config.bpgo_by_reward.items() if bpgo.uses_trust and bpgo.trust_kind not in AGREEMENTS
    ]
    draft, rewards = loss.objective == "draft", {name: one for name, one in config.rewards.items() if one.weight}
    away = [name for name, reward in config.rewards.items() if reward.offload]
    flat = [name for name, reward in rewards.items() if reward.aggregate == "share_above"]
    values = {key: attrgetter(key)(config) for key in OBJECTIVES.get(loss.objective, {})}
    return {
        **{
            f"{key} is {values[key]!r} with loss.objective = {loss.objective!r}, which {why}; set it to {needed!r}, or "
            "the objective to 'policy_gradient'": values[key] != needed
            for key, (needed, why) in OBJECTIVES.get(loss.objective, {}).items()
        },
        "credit.kind is 'segment' with advantage.combine = 'gdpo', which rescales the sum of advantages by batch, so "
        "gamma has no fixed size relative to it; set combine to 'weighted_sum', or credit.kind to 'video'": (
            segment and config.advantage.combine == "gdpo"
        ),
        f"loss.old_decay is {loss.old_decay} with loss.objective = {loss.objective!r}: only 'awm' and 'nft' learn from "
        "an old policy that moves slowly; set it to 0": loss.old_decay > 0 and loss.objective not in AGAINST_OLD,
        f"loss.noise_levels is {loss.noise_levels!r} with loss.objective = {loss.objective!r}, which trains the steps "
        "of the schedule; set it to 'schedule'": loss.noise_levels != "schedule" and loss.objective not in FINAL_VIDEOS,
        "loss.kl_reference is 'ema' with ema.decay = 0, which keeps no average; set ema.decay, say to 0.99": (
            pulls and loss.kl_reference == "ema" and config.ema.decay == 0
        ),
        "loss.kl_reference is 'ema' with optim.parameters = 'gathered': the average replaces the weights in each pass, "
        "and would have to be gathered every time; set optim.parameters to 'auto'": (
            pulls and loss.kl_reference == "ema" and config.optim.parameters == "gathered"
        ),
        "loss.kl_reference is 'previous' with optim.updates_per_rollout = 1: the policy is then the one that sampled, "
        "and the divergence is always 0; take 2 updates or more, or another reference": (
            loss.kl_weight != 0 and loss.kl_reference == "previous" and updates == 1 and not old
        ),
        f"loss.kl_reference is 'previous' with loss.objective = {loss.objective!r}, whose recipe records nothing of "
        "the policy that sampled; set it to 'start' or 'ema'": (
            loss.objective in AGAINST_REFERENCE and loss.kl_reference == "previous"
        ),
        f"the trust of {by_level} weighs groups by the level of their rewards, and loss.objective 'dpo' weighs no "
        f"group: it makes labels of how far scores agree; set bpgo.trust to one of {AGREEMENTS} or 'none'": (
            dpo and bool(by_level)
        ),
        f"loss.dpo_pairs is {loss.dpo_pairs}, but a group of rollout.group_size = {group} has {group // 2} pairs; "
        f"lower it to {group // 2}": dpo and 2 * loss.dpo_pairs > group,
        f"loss.draft_steps is {loss.draft_steps}, but a video takes {config.sampler.num_steps} denoising steps "
        f"(sampler.num_steps); lower it to that": draft and loss.draft_steps > config.sampler.num_steps,
        f"loss.draft_steps is {loss.draft_steps} with parallel.sequence = {config.parallel.sequence}: the gradient in "
        "the latents, which all steps but the last need, is not summed over a sequence group; set one of them to 1": (
            draft and loss.draft_steps > 1 and config.parallel.sequence > 1
        ),
        f"rewards {away} have offload with loss.objective = 'draft', which scores in the update, too; set offload to "
        "false": draft and bool(away),
        f"rewards {flat} have aggregate 'share_above' with loss.objective = 'draft', and a share has no gradient; set "
        "aggregate to 'mean' or 'soft_min'": draft and bool(flat),
        "rollout.micro_batch_size is 1 with loss.objective = 'dpo', whose pairs are trained together; set it to 2 or "
        "more": dpo and config.rollout.micro_batch_size == 1,
    }
