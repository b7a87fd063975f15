"""The denoising steps that a recipe trains, and the rules between its settings and its policy.

Each message of a rule has the values, the rule and the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.diffusion.steps import STEP_SELECTIONS
from bpgo_video.policies import Policy
from bpgo_video.policies.networks import trained_names
from bpgo_video.policies.schedule import given_sigmas
from bpgo_video.randomness import generator_of

TrainedSteps = Callable[[int], tuple[int, ...]]  # prompt id -> indices of its stochastic steps


def rollout_sigmas(policy: Policy, config: Config) -> Float[Tensor, "points"]:
    """The noise levels of a rollout: the recipe's own, or the family's for such a video; the last is 0."""
    sampler = config.sampler
    if sampler.sigmas:
        return given_sigmas(sampler.sigmas)
    return policy.sigmas(sampler.num_steps, config.video, sampler.shift)


def transformers_by_step(policy: Policy, config: Config) -> list[str]:
    """The name of the transformer that computes each denoising step; Wan 2.2 has one for high noise and one for low."""
    return [policy.transformer_at(float(sigma)) for sigma in rollout_sigmas(policy, config)[:-1]]


def trainable_steps(policy: Policy, config: Config) -> tuple[int, ...]:
    """The denoising steps that can be trained: those of trained transformers, without the last step."""
    trained = trained_names(policy.folder, config.policy.trained)
    return tuple(index for index, name in enumerate(transformers_by_step(policy, config)[:-1]) if name in trained)


def trained_steps_of(policy: Policy, config: Config, step: int) -> TrainedSteps:
    """The denoising steps that training step `step` trains, drawn once for all prompts or for each prompt id.

    Args:
        step: below 0 stands for before training, where a moving window is at its start.
    """
    sampler, seed, trainable = config.sampler, config.run.seed, trainable_steps(policy, config)
    start = sampler.window_start + (max(step, 0) // sampler.window_every if sampler.window_every else 0)

    def select(prompt: int) -> tuple[int, ...]:
        prompt_key = (prompt,) if sampler.share_steps == "group" else ()
        generator = generator_of(seed, "trained steps", step, *prompt_key)
        count = sampler.trained_of(len(trainable))
        selected = STEP_SELECTIONS[sampler.train_steps](len(trainable) + 1, count, start, generator)
        return tuple(trainable[position] for position in selected)

    return select


def sampled_steps(policy: Policy, config: Config, step: int) -> TrainedSteps:
    """The stochastic steps of a rollout: the trained ones, or none for objectives on final videos (awm, nft)."""
    return trained_steps_of(policy, config, step) if config.loss.replays_transitions else no_steps


def no_steps(prompt: int) -> tuple[int, ...]:
    """No stochastic steps: all follow the ODE."""
    return ()


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
    if (splits := len(config.rollout.branches)) > count:
        yield (
            f"rollout.branches splits at {splits} trained steps, but a rollout trains {count} of the denoising steps "
            f"{list(steps)}, which {list(trained)} compute(s); train more steps, or give {count} branches at most"
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
