"""Which settings go together: the defaults of methods, rules on combinations, and how a step divides over ranks.

Each table of rules maps a message - the values, the rule, the way out - to whether the recipe breaks that rule.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bpgo_video.config.bpgo import Config, ConfigError, EmaConfig, ParallelConfig, PolicyConfig, VideoConfig
from bpgo_video.config.branching import branch_rules, branch_rules_of_ranks
from bpgo_video.config.evaluation_rules import alarm_rules
from bpgo_video.config.fields import HELD
from bpgo_video.config.learner import RewardConfig
from bpgo_video.config.objective_rules import OBJECTIVE_DEFAULTS, objective_rules
from bpgo_video.config.run import OptimizerConfig, RunConfig
from bpgo_video.config.sampling_ahead import ahead_rules
from bpgo_video.config.schedule_rules import schedule_rules
from bpgo_video.errors import shown

Rules = Mapping[str, object]
Replacement = tuple[str, str, Any, str]  # section, key, value, and a line about the value before, if there is one
MOST_GIGABYTES = 256  # of the videos of a micro-batch
LONGEST = 255  # bytes of a name on Linux
SETTINGS = "config.yaml"  # in a run's folder: its resolved recipe
OWNER = "owner.lease"  # in a folder that one launch at a time may write to: which one that is
# (key, method) -> its own defaults, of which a recipe takes those without which it breaks a rule
METHODS: dict[tuple[str, str | bool], dict[str, Any]] = {
    **{("loss.objective", name): settings for name, settings in OBJECTIVE_DEFAULTS.items()},
    ("rollout.sample_ahead", True): {"run.save_minutes": 0.0},
    ("prior.kind", "none"): {"bpgo.zeta": 0.0, "bpgo.alpha": 0.0},
    ("bpgo.form", "released_exact"): {"bpgo.zeta": 0.0, "bpgo.standardise": False, "bpgo.trust": None},
    ("advantage.normalise", "max_std"): {"bpgo.alpha": 0.0},
    ("advantage.normalise", "none"): {"bpgo.zeta": 0.0},
    ("advantage.normalise", "win_rate"): {"bpgo.zeta": 0.0},
    ("loss.kl_reference", "ema"): {"ema.decay": 0.99},
    ("evaluation.weights", "ema"): {"ema.decay": 0.99},
    ("evaluation.weights", "both"): {"ema.decay": 0.99},
    ("bpgo.form", "paper"): {"bpgo.alpha": 0.5},
}


def method_defaults(tree: Mapping[str, Any], written: Collection[str]) -> Iterator[Replacement]:
    """Settings that the methods of a recipe may replace.

    Args:
        tree: the recipe as plain data.
        written: keys that its user wrote, which nothing replaces; the others come from shipped recipes.
    """

    def value_at(key: str) -> Any:
        section, name = key.split(".")
        values = tree.get(section)
        return values.get(name, ...) if isinstance(values, Mapping) else ...  # `...` if it is absent

    for (key, method), settings in METHODS.items():
        for name, value in settings.items() if value_at(key) == method else ():
            if (before := value_at(name)) != value and name not in written:
                note = "" if before is ... else f"{name} is {value!r} in place of {before!r}, since {key} is {method!r}"
                yield (*name.split("."), value, note)


def size_rules(video: VideoConfig, micro_batch_size: int, described: str, samples: int) -> Rules:
    """What no machine can hold: the videos of a micro-batch, and the samples of a step."""
    pixels = video.num_frames * video.height * video.width
    gigabytes = micro_batch_size * pixels * 12 / 1e9  # three channels in fp32
    return {
        f"{described} are more than the {HELD:,} that a step can have; lower one of them": samples > HELD,
        f"micro_batch_size is {micro_batch_size:,} and video is {video.num_frames:,} frames of {video.height:,} x "
        f"{video.width:,}: such a micro-batch takes {gigabytes:,.0f} GB; lower one of them": gigabytes > MOST_GIGABYTES,
    }


def common_rules(
    policy: PolicyConfig, parallel: ParallelConfig, optim: OptimizerConfig, ema: EmaConfig, evaluated: str
) -> Rules:
    """Of recipes of every kind; `evaluated` is evaluation.weights."""
    return {
        f"policy.checkpointed_share is {policy.checkpointed_share} with gradient_checkpointing = false, which computes "
        "no block again; set policy.gradient_checkpointing to true, or leave the share out": (
            policy.checkpointed_share < 1 and not policy.gradient_checkpointing
        ),
        f"optim.average is 'update' with optim.parameters = {optim.parameters!r}: whole gradients need whole weights; "
        "set optim.parameters to 'gathered', or optim.average to 'micro_batch'": (
            optim.average == "update" and optim.parameters != "gathered"
        ),
        f"evaluation.weights is {evaluated!r} with ema.decay = 0, which keeps no average; set ema.decay (0.99 averages "
        "over about 100 updates), or evaluate the 'raw' weights": evaluated != "raw" and ema.decay == 0,
    }


def reward_rules(config: Config, section: str, name: str, reward: RewardConfig) -> Rules:
    """Of one reward; `section` is rewards or evaluation.rewards."""
    of_run, key = section == "rewards", f"{section}.{name}"
    trained = of_run and reward.weight > 0
    kind, at, has_number = reward.aggregate, reward.aggregate_at, reward.aggregate not in ("mean", "min")
    scorings = [reward.options, *({**reward.options, **options} for options in reward.rescorings)]
    repeats = any(options in scorings[:i] for i, options in enumerate(scorings))
    bpgo = config.bpgo_by_reward.get(name)
    trust = bpgo.trust if bpgo and bpgo.uses_trust else None
    return {
        f"reward name {name!r} must consist of letters, digits and any of . : _ -": (
            not re.fullmatch(r"[\w:-][\w.:-]*", name)
        ),
        f"{name!r} is in rewards and in evaluation.rewards; use two names to train on a reward and also report it on "
        "held-out prompts": of_run and name in config.evaluation.rewards,
        f"{key}.aggregate_at is {at}, which aggregate = {kind!r} does not use; remove it": (
            not has_number and at is not None
        ),
        f"{key}.aggregate is {kind!r}, which needs a number: set {key}.aggregate_at": has_number and at is None,
        f"{key}.aggregate_at is {at}; the temperature of soft_min must be above 0": (
            kind == "soft_min" and at is not None and not at > 0
        ),
        f"{key}.aggregate_at is {at}; the share of top_share must be above 0 and at most 1": (
            kind == "top_share" and at is not None and not 0 < at <= 1
        ),
        f"{key} has trust 'reliability', which compares several scorings of a video, and no rescorings; set "
        f"{key}.rescorings, such as [{{frames: 4}}], or {key}.trust to 'frames' or 'none'": (
            trust == "reliability" and not reward.rescorings
        ),
        f"{key} has trust 'frames', which compares the scores of a video's frames, and video.num_frames is 1; set "
        f"{key}.trust to 'sigmoid' or 'none', or to 'reliability' with rescorings": (
            trust == "frames" and config.video.num_frames == 1
        ),
        f"{key} has trust 'uncertainty' with aggregate = {kind!r}: only the error of a mean over frames follows from "
        f"theirs; set {key}.aggregate to 'mean', or {key}.trust to another": trust == "uncertainty" and kind != "mean",
        f"{key}.rescorings is {list(reward.rescorings)}: each needs options that differ from {key}.options and from "
        "the others', since an equal model gives an equal score": repeats,
        f"{key} {'is watched (weight 0)' if of_run else 'is held out'}, and trust and rescorings are of rewards that "
        f"train; remove them from {key}": not trained and (reward.trust is not None or bool(reward.rescorings)),
    }


def learner_rules(config: Config) -> Rules:
    bpgo, advantage, rollout = config.bpgo, config.advantage, config.rollout
    best, group, samples = advantage.best_of or 0, rollout.group_size, config.prior.samples
    return {
        "rewards has none of weight above 0 to train on; add one": (not config.trained_rewards),
        "bpgo.ras_center is 'batch_mean' with rollout.prompts_per_step = 1: the only group is its own mean, so its "
        "trust is always 1; take more prompts per step, or set ras_center to 'none'": (
            config.uses_trust and bpgo.ras_center == "batch_mean" and rollout.prompts_per_step == 1
        ),
        f"prior.kind is 'none', but bpgo.alpha = {bpgo.alpha}, bpgo.trust = {bpgo.trust!r} and bpgo.zeta = {bpgo.zeta} "
        "need an anchor; set prior.kind to 'reference' or 'constant', or bpgo.zeta to 0 and bpgo.alpha to 0 "
        "(plain GRPO) or bpgo.trust to 'frames', 'reliability', 'uncertainty' or 'none'": (
            config.needs_prior and config.prior.kind == "none"
        ),
        f"prior.samples is {samples} with rollout.same_start: a prior takes two or more pairs of samples that share a "
        f"start; set it to {max(4, samples + samples % 2)}": rollout.same_start and (samples < 4 or samples % 2 > 0),
        f"advantage.best_of is {best}, but a group of rollout.group_size = {group} has no {best} best and {best} worst "
        f"samples; set it to {group // 2} at most": 2 * best > group,
        f"advantage.normalise is 'none' with bpgo.zeta = {bpgo.zeta}: the first advantage is then in units of the "
        "reward and the second in transformed ones, so zeta has no meaning; set bpgo.zeta to 0, or normalise to "
        "'group'": advantage.normalise == "none" and bpgo.zeta != 0,
        f"advantage.normalise is 'win_rate' with bpgo.zeta = {bpgo.zeta}: win rates depend on the order alone, which "
        "the transformation keeps, so the second surrogate would repeat the first; set bpgo.zeta to 0": (
            advantage.normalise == "win_rate" and bpgo.zeta != 0 and bpgo.form == "paper" and bpgo.standardise
        ),
        f"advantage.normalise is 'max_std' with bpgo.alpha = {bpgo.alpha}: both weigh groups against each other, one "
        "by spread and one by trust; set bpgo.alpha to 0, or normalise to 'group'": (
            advantage.normalise == "max_std" and config.uses_trust
        ),
        f"advantage.drop_zero_std is true with bpgo.alpha = {bpgo.alpha}: leaving groups out changes each batch's step "
        "size, which cannot be separated from the effect of trust; set one of them to false or 0": (
            advantage.drop_zero_std and config.uses_trust
        ),
    }


def sampler_rules(config: Config) -> Rules:
    sampler, rollout, updates = config.sampler, config.rollout, config.optim.updates_per_rollout
    trained = sampler.trained_count
    return {
        f"sampler.eta is {sampler.eta}; cps takes values up to 1": sampler.name == "cps" and sampler.eta > 1,
        "sampler.share_steps is 'group', which gives each prompt its own trained steps, but rollout.micro_batch_size "
        f"{rollout.micro_batch_size} mixes prompts of group_size {rollout.group_size}; set it to a divisor of that": (
            sampler.share_steps == "group" and rollout.group_size % rollout.micro_batch_size
        ),
        f"optim.updates_per_rollout is {updates}, but {trained} of {sampler.num_steps} denoising steps are trained and "
        f"each update needs one of its own; lower it to {trained}, or train more steps": updates > trained,
    }


def check(config: Config) -> None:
    """Raise ConfigError with the first rule that the recipe breaks."""
    for section, rewards in (("rewards", config.rewards), ("evaluation.rewards", config.evaluation.rewards)):
        for name, reward in rewards.items():
            check_rules(reward_rules(config, section, name, reward))
    samples, described = config.samples
    check_rules(size_rules(config.video, config.micro_batch_size, described, samples))
    for rules in (
        learner_rules,
        alarm_rules,
        sampler_rules,
        schedule_rules,
        objective_rules,
        ahead_rules,
        branch_rules,
    ):
        check_rules(rules(config))
    check_rules(common_rules(config.policy, config.parallel, config.optim, config.ema, config.evaluation.weights))


def check_free(run: RunConfig) -> bool:
    """Whether the run's folder holds a run, which this one continues.

    Raises:
        ConfigError: it does, and `run.resume` is "never".
    """
    folder = Path(run.dir)
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {SETTINGS, OWNER}:
        return False  # or left by a run that failed before it built its policy
    if run.resume == "never":
        raise ConfigError(
            f"run.dir {run.dir!r} exists and is never overwritten; continue it with --run.resume auto, or name "
            "another folder with --run.dir"
        )
    return True


def check_name(folder: Path, key: str, remedy: str) -> None:
    """Raise ConfigError if there can be no folder of this name: it is a file or under one, or too long."""
    reason = ""
    try:
        if longest := max((part for part in folder.parts if len(os.fsencode(part)) > LONGEST), default=""):
            reason = f"has a name of {len(os.fsencode(longest))} bytes; at most {LONGEST} are possible"
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(folder)
    except (OSError, ValueError) as error:  # too long in all, links in a circle, a zero byte
        reason = reason or f"is no path: {getattr(error, 'strerror', error)}"
    present = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path())
    if not reason and not present.is_dir():
        reason = f"cannot be a folder: {present} is {'a file' if present.exists() else 'a link to nothing'}"
    if reason:
        raise ConfigError(f"{key} {shown(str(folder))} {reason}; {remedy}")


def check_rules(rules: Rules) -> None:
    """Raise ConfigError with the first message of a broken rule."""
    for message, broken in rules.items():
        if broken:
            raise ConfigError(message)


def check_world(config: Any, world_size: int) -> None:
    """Raise ConfigError unless all ranks get equally many whole micro-batches, and sequence groups divide the ranks.

    Args:
        config: a recipe of any kind.
    """
    (samples, described), sequence, size = config.samples, config.parallel.sequence, config.micro_batch_size
    if world_size % sequence:
        divisors = [divisor for divisor in range(1, world_size + 1) if world_size % divisor == 0]
        raise ConfigError(
            f"parallel.sequence is {sequence}, which does not divide {world_size} ranks into groups; it can be one of "
            f"{divisors}"
        )
    groups = world_size // sequence
    unit = groups * size
    if samples % unit:
        raise ConfigError(
            f"{described} do not divide into {groups} {'ranks' if sequence == 1 else 'sequence groups'} x "
            f"micro_batch_size {size} = {unit}; change one of them so that the samples are a multiple (for example "
            f"{max(unit, samples - samples % unit)})"
        )
    if isinstance(config, Config):
        check_rules(branch_rules_of_ranks(config, groups))
