"""Rules between a recipe's settings and its policy; each message has the values, the rule and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.data.reader import PromptShards
from bpgo_video.learner.priors import FROM_IMAGES
from bpgo_video.policies import Policy
from bpgo_video.policies.networks import trained_names
from bpgo_video.rollouts.rollout import trainable_steps, transformers_by_step


def check_experts(policy: Policy, config: Config) -> None:
    """Check trained steps and guidance of a policy with one or several transformers.

    Raises:
        ConfigError: the first broken rule.
    """
    for rule in (training_rules, sharing_rules, both_guidance_rules):
        for message in rule(policy, config):
            raise ConfigError(message)


def training_rules(policy: Policy, config: Config) -> Iterator[str]:
    """Every trained transformer needs a trainable step, and every update a trained one."""
    names, sampler = transformers_by_step(policy, config), config.sampler
    trained, steps = trained_names(policy.folder, config.policy.trained), trainable_steps(policy, config)
    for name in trained:
        if name not in names[:-1]:
            computes = "only the last step, which is never trained" if name in names else "no step"
            yield (
                f"{name} is trained, but with sampler.num_steps = {sampler.num_steps} and sampler.shift = "
                f"{sampler.shift} it computes {computes}; name the other transformer in policy.trained, or change the "
                "number of steps or the shift"
            )
    updates, count = config.optim.updates_per_rollout, sampler.trained_of(len(steps))
    if updates > count:
        yield (
            f"optim.updates_per_rollout is {updates}, but a rollout trains {count} of the denoising steps {list(steps)}"
            f", which {list(trained)} compute(s), and each update needs one; lower it to {count}, or train more steps"
        )


def sharing_rules(policy: Policy, config: Config) -> Iterator[str]:
    """All ranks must compute the same transformer at the same time: its gradients and ZeRO-3 weights are collective."""
    sampler, names = config.sampler, transformers_by_step(policy, config)
    called = sorted({names[index] for index in trainable_steps(policy, config)})
    drawn_per_prompt = sampler.share_steps == "group" and sampler.train_steps in ("random", "random_window")
    if drawn_per_prompt and len(called) > 1:
        yield (
            f"sampler.share_steps is 'group', so that ranks would train different ones of {called} at the same time "
            "and wait for each other forever; set it to 'batch', or policy.trained to one of them"
        )


def both_guidance_rules(policy: Policy, config: Config) -> Iterator[str]:
    for name, section in (("sampler.", config.sampler), ("evaluation.", config.evaluation)):
        yield from guidance_rules(name, section.guidance_scale, section.guidance_scale_2, policy.transformer_names)


def guidance_rules(section: str, scale: float, scale_2: float | None, names: Sequence[str]) -> Iterator[str]:
    """A second guidance scale needs a second transformer; diffusers' pipelines use neither if the first scale is 1."""
    if scale_2 is None:
        return
    if len(names) == 1:
        yield f"{section}guidance_scale_2 is {scale_2}, but the policy has one transformer; set it to None"
    elif scale == 1 and scale_2 != 1:
        yield (
            f"{section}guidance_scale_2 is {scale_2} with {section}guidance_scale = 1, at which diffusers' pipelines "
            "guide no step at all; set guidance_scale above 1, or guidance_scale_2 to None"
        )


def check_images(config: Config, takes_images: bool, shards: PromptShards, splits: Sequence[str]) -> None:
    """Check that prompts have images where the policy or the prior needs them.

    Raises:
        ConfigError: they have none; names the policy or the prior, and the split.
        ShardError: only some prompts of a split have an image.
    """
    if not takes_images:
        if config.prior.kind in FROM_IMAGES:
            raise ConfigError(
                f"prior.kind is {config.prior.kind!r}, which scores the images that videos continue, but "
                f"{config.policy.folder} makes videos of texts; set prior.kind to 'reference' or 'ema'"
            )
        return
    for split in splits:
        if not shards.has_images(split):
            raise ConfigError(
                f"{config.policy.folder} makes videos of images, but the prompts of split {split!r} of "
                f"{config.data.shards} have none; build the shards from .jsonl lines with an 'image'"
            )
