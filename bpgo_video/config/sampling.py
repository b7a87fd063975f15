"""Sections of recipes: how videos are sampled, and the rollouts of a training step."""

from __future__ import annotations

from typing import Annotated, Literal

from bpgo_video.config.fields import (
    AboveZero,
    AtLeastOne,
    Count,
    Held,
    OrFunction,
    Positive,
    Several,
    Share,
    Sigmas,
    Switch,
    section,
)


@section
class SamplerConfig:
    name: Annotated[Literal["flow_sde", "dance_sde", "cps", "sage", "truncated"], OrFunction] = "flow_sde"
    """Transition of the trained steps (`bpgo_video.diffusion.sde.SAMPLERS`); the other steps follow the ODE."""
    num_steps: Several = 16
    """Denoising steps of a rollout."""
    eta: AboveZero = 0.7
    """Noise level of the transition."""
    guidance_scale: AtLeastOne = 1.0
    """Classifier-free guidance in rollout and replay; 1 uses none."""
    guidance_scale_2: AtLeastOne | None = None
    """Guidance scale of the low-noise transformer if a pipeline has two (Wan 2.2); None takes guidance_scale."""
    shift: AboveZero | None = None
    """Shift of the sigma schedule; None takes the pipeline's own schedule."""
    sigmas: Sigmas = ()
    """Noise levels at which the `num_steps` steps start, such as [1.0, 0.9375, 0.8333, 0.625] of a distilled policy;
    the last step ends at 0. They are taken as they are, without a shift. Empty: the pipeline's own schedule."""
    latents_dtype: Literal["float32", "bfloat16"] = "float32"
    """Latents are rounded to this before their log-prob is computed, so that the replay uses the same numbers."""
    train_steps: Literal["all", "random", "window", "random_window"] = "all"
    """Denoising steps that are stochastic and trained; the last step never is. `random` chooses a share of them in each
    rollout; `window` is a run of neighbouring steps from `window_start`, `random_window` one at a random position."""
    train_fraction: Share = 1.0
    """Share of the steps but the last that are trained, at least one; also the length of a window. If only one of two
    transformers is trained (`policy.trained`), this and the next keys count that transformer's steps."""
    window_start: Count = 0
    """`window`: its first step; 0 is the noisiest."""
    window_every: Count = 0
    """`window`: training steps after which it moves on by one step; it starts again after the end. 0 never moves it."""
    share_steps: Literal["batch", "group"] = "batch"
    """Random steps are chosen once for all prompts of a training step (`batch`), or once for each prompt (`group`)."""
    solver: Annotated[Literal["euler", "adams_bashforth"], OrFunction] = "euler"
    """ODE solver of the untrained steps: first order, or second order at the same cost."""

    @property
    def trained_count(self) -> int:
        """Trained steps of a rollout in which all steps but the last can be trained."""
        return self.trained_of(self.num_steps - 1)

    def trained_of(self, trainable: int) -> int:
        """Trained steps of a rollout in which `trainable` steps can be trained."""
        share = 1.0 if self.train_steps == "all" else self.train_fraction
        return max(1, round(share * trainable))


@section
class RolloutConfig:
    prompts_per_step: Held = 2
    """Prompts (groups) of one training step, over all ranks."""
    group_size: Several = 8
    """G, the samples of one prompt."""
    micro_batch_size: Held = 8
    """Samples that one rank denoises, decodes and replays at once."""
    same_start: Switch = False
    """Start all samples of a prompt from the same noise (DanceGRPO, arXiv 2505.07818): only the trained steps make
    their rewards differ."""
    branches: tuple[Positive, ...] = ()
    """Sample trees (BranchGRPO, arXiv 2509.06040): children of each node at the first, second ... trained step, with
    `same_start`; their product is the group's size. [4, 2] makes 4 nodes, then 8 samples. What samples share is
    computed and replayed once, with the mean of their advantages. Empty: samples split at every trained step."""
    parameters: Literal["auto", "gathered", "sharded"] = "auto"
    """ZeRO-3: `gathered` keeps all weights on every rank during a rollout; `sharded` fetches each block in every
    denoising step; `auto` gathers if the weights take at most half of the free memory."""
    guidance_every: Positive = 1
    """Steps that are not trained compute the negative prompt's half of the guidance once in so many of them, and use
    its distance from the other half in between: at 2 a quarter less work. Other videos are sampled, and the ratio stays
    1; bpgo-video doctor measures the difference."""
    attention_backend: str | None = None
    """Attention of the steps that are not trained, such as `sage`, which has no gradient; None takes
    policy.attention_backend. Other videos are sampled, as above."""
    score_ahead: Count = 2
    """Chunks of videos that may wait for their scores while the next one is sampled; 0 scores in line. The results are
    the same; each chunk takes the memory of a micro-batch's videos."""
    sample_ahead: Switch = False
    """Sample the next step's videos before this step's update, so that rewards score while the policy samples and
    trains: for rewards that take longer than that. Rollouts are then one step old (their first ratio is not 1), except
    after checkpoints and evaluations. A step's videos may wait for their scores, in place of `score_ahead` chunks."""
    offload_trajectories: Switch = False
    """Keep trajectories on the CPU between rollout and replay, which fetches one step of them at a time."""

    @property
    def takes_shortcuts(self) -> bool:
        """Whether untrained steps are computed more cheaply than trained ones."""
        return self.guidance_every > 1 or self.attention_backend is not None
