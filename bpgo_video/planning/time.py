"""Time plan of a job: seconds of a training step by phase, hours of the run and of what surrounds it, and its bytes.

    denoising       forwards of the transformer / rate, with their log-probs left out
    decoding        the VAE's products / rate, then its elementwise work / memory bandwidth
    reward          products of the reward models / rate, as if they did not overlap with the rollout; with
                    rollout.sample_ahead the shorter of this and all else is hidden, but once between two pauses
    replay          forwards with backward (and recomputation) / rate, and forwards of a reference or of old velocities
    optimizer       bytes that AdamW reads and writes / memory bandwidth; offloaded, the host's and the link to it
    gather          weights that a rank lacks, once for a rollout or an update, or block by block behind the compute
    reduction       fp32 gradients of each pass (ZeRO 2, 3) or update (ZeRO 1); what the backward hides is left out
    sequence group  all-to-all of Ulysses, which nothing hides

Counts come from `job.count_step` and from runs on fake tensors; rates from `cards`. All ranks do equal work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from bpgo_video.config.bpgo import Config
from bpgo_video.config.run import pauses_after
from bpgo_video.planning.cards import HOST_MEMORY, Rates
from bpgo_video.planning.communication import Passes, communication
from bpgo_video.planning.job import Job
from bpgo_video.planning.memory import Plan
from bpgo_video.planning.zero import FP32, checkpoint_bytes
from bpgo_video.rollouts.prior_sampling import PriorWork, count_priors, reads_priors

PHASES: Mapping[str, tuple[str, ...]] = {  # of a step, as `seconds/*` in metrics.jsonl
    "rollout": ("denoising", "decoding", "gather (rollout)", "sequence group (rollout)"),
    "reward": ("reward",),
    "update": ("replay", "optimizer", "gather (update)", "reduction", "sequence group (update)"),
}


@dataclass(frozen=True)
class Bill:
    """What a run costs.

    Attributes:
        seconds: of a training step, by the parts of `PHASES`.
        hidden: seconds of communication that the compute hides.
        overlapped: seconds of rewards, or of all else, that `rollout.sample_ahead` hides in a step, on average.
        work: operations of a rank in a step, by part.
        run, evaluation, priors: hours of training and evaluations together, of one evaluation, and of the priors.
        evaluations: how many the run makes.
        prior_prompts: prompts that priors are measured of.
        checkpoint, kept, export: bytes of one checkpoint, of all that are on disk at once, and of the exports.
    """

    seconds: Mapping[str, float]
    hidden: float
    overlapped: float
    work: Mapping[str, float]
    run: float
    evaluation: float
    evaluations: int
    priors: float
    prior_prompts: int
    checkpoint: int
    kept: int
    export: int

    @property
    def step(self) -> float:
        """Seconds of a training step."""
        return sum(self.seconds.values()) - self.overlapped

    def phase(self, name: str) -> float:
        """Seconds of `rollout`, `reward` or `update`."""
        return sum(self.seconds[part] for part in PHASES[name])

    @property
    def hours(self) -> float:
        """Of priors, training and evaluations."""
        return self.priors + self.run


def bill(job: Job, plan: Plan, rates: Rates) -> Bill:
    """The bill of a job whose memory is planned."""
    config = job.config
    seconds, hidden, work = step_seconds(job, plan, rates)
    overlapped = seconds_overlapped(config, seconds)
    evaluation = evaluation_seconds(job, rates) / 3600
    evaluations = count_evaluations(job)
    each, saved = checkpoint_bytes(job.zero, job.weights, config), config.run
    forever = saved.num_steps // saved.keep_every if saved.keep_every else 0
    written = min(saved.keep_checkpoints + 1 + forever, ceil(saved.num_steps / saved.save_every))
    prior = count_priors(config, job.ranks, job.prompts.get(config.data.split)) if reads_priors(config) else None
    return Bill(
        seconds=seconds,
        hidden=hidden,
        overlapped=overlapped,
        work=work,
        run=saved.num_steps * (sum(seconds.values()) - overlapped) / 3600 + evaluations * evaluation,
        evaluation=evaluation,
        evaluations=evaluations,
        priors=prior_seconds(job, prior, rates) / 3600 if prior else 0.0,
        prior_prompts=prior.prompts if prior else 0,
        checkpoint=each,
        kept=each * written,
        export=job.weights.elements * job.zero.weight_bytes * (2 if config.ema.decay else 1),
    )


def step_seconds(job: Job, plan: Plan, rates: Rates) -> tuple[dict[str, float], float, dict[str, float]]:
    """Seconds of a step by part, those of hidden communication, and operations by part."""
    passes, foot = Passes.of(job), job.footprint
    operations = {
        "denoising": passes.forwards * foot.forward.operations,
        "decoding": decodings(job) * job.decoding.operations,
        "reward": videos_scored(job) * (job.reward.operations + job.reward.half_operations),
        "replay": passes.replays * foot.replay.operations + passes.extra * foot.forward.operations,
    }
    differentiated = job.samples * (job.differentiated.operations if job.differentiated else 0)
    scored_again = 3 * videos_scored(job) * job.config.parallel.sequence if job.differentiated else 0.0
    operations["replay"] += differentiated + scored_again * (job.reward.operations + job.reward.half_operations)
    waits = communication(job, plan, rates)
    extra = passes.extra * foot.forward.operations / rates.forward
    seconds = {
        "denoising": operations["denoising"] / rates.forward,
        "decoding": decodings(job) * decoding_seconds(job, rates),
        "reward": videos_scored(job) * reward_seconds(job, rates),
        "replay": passes.replays * foot.replay.operations / rates.replay
        + extra
        + (differentiated / rates.decode + scored_again * reward_seconds(job, rates)),
        "optimizer": passes.updates * optimizer_seconds(job, rates),
        **{name: wait.waited for name, wait in waits.items()},
    }
    return seconds, sum(wait.hidden for wait in waits.values()), operations


def seconds_overlapped(config: Config, seconds: Mapping[str, float]) -> float:
    """Hidden seconds of a mean step:   min(r, s) (1 - p/n),   r the reward's, s those of rollout and update.

    With `rollout.sample_ahead`, m steps to the next pause take m max(r, s) + min(r, s) at most: rewards score all the
    time, but the first rollout precedes all scores, and the last update follows them. A run of n steps has p pauses.
    """
    run, every = config.run, config.evaluation.every
    if not config.rollout.sample_ahead:
        return 0.0
    pauses = sum(pauses_after(step, run, every) for step in range(1, run.num_steps + 1))
    reward = sum(seconds[part] for part in PHASES["reward"])
    return min(reward, sum(seconds.values()) - reward) * (1 - pauses / run.num_steps)


def decodings(job: Job) -> float:
    """Calls of the VAE on one rank in a step."""
    return job.samples / job.config.parallel.sequence / job.decoded_at_once


def videos_scored(job: Job) -> float:
    """Videos that one rank decodes and scores in a step."""
    return job.samples / job.config.parallel.sequence


def decoding_seconds(job: Job, rates: Rates) -> float:
    """Of one call of the VAE: products, then elementwise work."""
    elementwise = job.decoding.moved / rates.decode_memory if rates.decode_memory else 0.0
    return job.decoding.operations / rates.decode + elementwise


def reward_seconds(job: Job, rates: Rates) -> float:
    """Of scoring one video."""
    if rates.video_seconds is not None:
        return rates.video_seconds
    return job.reward.operations / rates.reward + job.reward.half_operations / rates.half_reward


def optimizer_seconds(job: Job, rates: Rates) -> float:
    """Of one update: gradient, weight and two moments read, weight and moments written, in fp32.

    Offloaded, gradients go to the host and weights come back; the host's memory bounds the rest.
    """
    share = job.zero.share(sum(job.weights.trained))
    adam = job.config.optim.name == "adamw"
    moved = share * FP32 * ((7 if adam else 3) + 2 * job.config.averages)
    if not job.zero.on_host("offload_optimizer"):
        return moved / rates.memory
    crossing = share * (FP32 + job.zero.weight_bytes) / rates.host_link
    return moved / min(HOST_MEMORY, rates.memory) + crossing


def evaluation_seconds(job: Job, rates: Rates) -> float:
    """Of one evaluation, of as many prompts as the recipe allows; 0 without held-out rewards."""
    evaluation, config = job.config.evaluation, job.config
    if not evaluation.rewards:
        return 0.0
    prompts = min(evaluation.max_prompts, job.prompts.get(evaluation.split, evaluation.max_prompts))
    videos, groups = prompts * evaluation.samples_per_prompt, job.ranks // config.parallel.sequence
    micro_batches = ceil(videos / groups / config.rollout.micro_batch_size)  # the last one repeats videos
    guided = max(evaluation.guidance_scale, evaluation.guidance_scale_2 or 1) > 1
    halves = (1 + guided) / (1 + job.guided)
    forward = halves * job.footprint.forward.operations / rates.forward
    made = micro_batches * config.rollout.micro_batch_size / config.parallel.sequence  # by each rank
    each = decoding_seconds(job, rates) / job.decoded_at_once + reward_seconds(with_heldout_rewards(job), rates)
    return micro_batches * evaluation.num_steps * forward + made * each


def with_heldout_rewards(job: Job) -> Job:
    """The job with the held-out rewards in place of the trained ones."""
    return replace(job, config=replace(job.config, rewards=job.config.evaluation.rewards))


def count_evaluations(job: Job) -> int:
    """Of a whole run: before the first step, every `evaluation.every` steps, and after the last."""
    evaluation, steps = job.config.evaluation, job.config.run.num_steps
    if not evaluation.rewards:
        return 0
    during = ceil(steps / evaluation.every) if evaluation.every else 1
    return 1 + during * len(evaluation.measured)


def prior_seconds(job: Job, prior: PriorWork, rates: Rates) -> float:
    """Of measuring the reference priors."""
    rows = prior.micro_batch_size / job.config.rollout.micro_batch_size
    each = decoding_seconds(job, rates) / job.decoded_at_once + reward_seconds(job, rates)
    return prior.forwards * rows * job.footprint.forward.operations / rates.forward + prior.videos / job.ranks * each
