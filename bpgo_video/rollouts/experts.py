"""What follows where a policy has several transformers? Which steps train whom, and how strongly each is guided.

Wan 2.2 has two, one for high noise and one for low: each denoising step is of one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.policies import Policy
from bpgo_video.policies.networks import trained_names

DRAWN = ("random", "random_window")  # ways to select steps by which prompts can differ


def trainable_steps(policy: Policy, config: Config) -> tuple[int, ...]:
    """The denoising steps that can be trained: those of a trained transformer, without the last of all."""
    trained = trained_names(policy.folder, config.policy.trained)
    return tuple(index for index, name in enumerate(_transformers(policy, config)[:-1]) if name in trained)


def check_experts(policy: Policy, config: Config) -> None:
    """Whether the recipe trains what it says, on every rank alike.

    Raises:
        ConfigError: the first rule that is broken, with the steps and the way out.
    """
    for rule in (training_rules, sharing_rules, both_guidance_rules):
        for message in rule(policy, config):
            raise ConfigError(message)


def training_rules(policy: Policy, config: Config) -> Iterator[str]:
    """Every trained transformer has steps to learn from, and every update has one of them."""
    names, sampler = _transformers(policy, config), config.sampler
    trained, steps = trained_names(policy.folder, config.policy.trained), trainable_steps(policy, config)
    for name in (name for name in trained if name not in names[:-1]):
        yield (
            f"{name} is trained, but with sampler.num_steps = {sampler.num_steps} and sampler.shift = {sampler.shift} "
            f"it computes {'the last step alone, which never is' if name in names else 'no step'}; name the other in "
            "policy.trained, or change steps or shift"
        )
    updates, count = config.optim.updates_per_rollout, sampler.trained_of(len(steps))
    if updates > count:
        yield (
            f"optim.updates_per_rollout is {updates}, but {count} denoising steps of a rollout are trained, out of "
            f"{list(steps)}, which {list(trained)} compute(s), and each update needs one of its own; lower it to "
            f"{count}, or train more steps"
        )


def sharing_rules(policy: Policy, config: Config) -> Iterator[str]:
    """Gradients and, under ZeRO-3, weights of a transformer come from all ranks: these compute the same one."""
    sampler, names = config.sampler, _transformers(policy, config)
    called = sorted({names[index] for index in trainable_steps(policy, config)})
    if sampler.share_steps == "group" and sampler.train_steps in DRAWN and len(called) > 1:
        yield (
            f"sampler.share_steps is 'group', by which ranks would train steps of different transformers, of {called}, "
            "at the same time, while each waits for the others to call its own; set it to 'batch', or "
            "policy.trained to one of them"
        )


def both_guidance_rules(policy: Policy, config: Config) -> Iterator[str]:
    """Of the rollout and of the evaluation."""
    for section in (config.sampler, config.evaluation):
        where = "sampler." if section is config.sampler else "evaluation."
        yield from guidance_rules(where, section.guidance_scale, section.guidance_scale_2, policy.transformer_names)


def guidance_rules(where: str, scale: float, scale_2: float | None, names: Sequence[str]) -> Iterator[str]:
    """A second scale belongs to a second transformer, and diffusers' pipelines guide neither where the first is 1."""
    if scale_2 is None:
        return
    if len(names) == 1:
        yield f"{where}guidance_scale_2 is {scale_2}, but the policy has one transformer; set it to None"
    elif scale == 1 and scale_2 != 1:
        yield (
            f"{where}guidance_scale_2 is {scale_2} with {where}guidance_scale = 1, at which diffusers' pipelines guide "
            "no step at all; set guidance_scale above 1, or guidance_scale_2 to None"
        )


def _transformers(policy: Policy, config: Config) -> list[str]:
    """The name of the transformer of each denoising step."""
    sampler = config.sampler
    sigmas = policy.sigmas(sampler.num_steps, config.video, sampler.shift)
    return [policy.transformer_at(float(sigma)) for sigma in sigmas[:-1]]
