"""The bill of a run: counted operations against closed forms, seconds, hours and bytes by hand, rates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video.commands import plan as command
from bpgo_video.config.bpgo import Config, ConfigError, LossConfig
from bpgo_video.planning.calibrate import calibrate
from bpgo_video.planning.cards import CARDS, Rates, card_of, rates_of, read_rates, write_rates
from bpgo_video.planning.communication import Passes, extra_forwards
from bpgo_video.planning.footprint import Footprint, Weights, footprint
from bpgo_video.planning.job import Job, change, count_step
from bpgo_video.planning.memory import HOST_PROCESS, host_loading, host_saving, reckon
from bpgo_video.planning.models import policy_of
from bpgo_video.planning.rewards import RewardSize
from bpgo_video.planning.time import bill, count_evaluations, seconds_overlapped, step_seconds
from bpgo_video.planning.zero import checkpoint_bytes
from bpgo_video.rollouts.prior_sampling import count_priors
from tests.made.recipes import RECIPE
from tests.planning.test_planning import BF16, MODEL, VIDEO

DIM, FFN, TEXT, ROWS = 64, 128, 8, 2  # of MODEL
TOKENS = 4 * 8 * 8  # latents of 4 x 16 x 16 in patches of 2 x 2
UNIT = Rates("these tests", *[1e6] * 3, reward=1e6, half_reward=1e6, memory=1e6, decode_memory=None,
             link=1e6, network=1e6, host_link=1e6)  # fmt: skip


@pytest.fixture
def job(recipe: Config) -> Job:
    """The demo recipe on two ranks under ZeRO-3 in bf16, with a small model and a reward of known size."""
    config = replace(
        recipe,
        video=VIDEO,
        policy=replace(recipe.policy, gradient_checkpointing=True),
        rollout=replace(recipe.rollout, micro_batch_size=2, parameters="sharded", same_start=False),
        optim=replace(recipe.optim, parameters="sharded"),
    )
    zero = {**BF16, "zero_optimization": {"stage": 3}}
    return Job(config, zero, ranks=2, model=MODEL, stated_reward=RewardSize(10**6, 0, 5e5))


def each_block(**settings: Any) -> tuple[int, int, int, int]:
    """Operations of a forward and of a replay, and bytes exchanged in both, of one block: two minus one."""

    def of(blocks: int) -> Footprint:
        model = replace(MODEL, transformer={**MODEL.transformer, "num_layers": blocks})
        policy = policy_of(model, family=None, max_sequence_length=TEXT)
        return footprint(policy, VIDEO, ROWS, torch.bfloat16, **settings)

    few, more = of(1), of(2)
    assert (few.blocks, more.blocks) == (1, 2)
    return (
        more.forward.operations - few.forward.operations,
        more.replay.operations - few.replay.operations,
        more.forward.exchanged - few.forward.exchanged,
        more.replay.exchanged - few.replay.exchanged,
    )


LINEAR = ROWS * 2 * (TOKENS * (4 + 2) * DIM**2 + TEXT * 2 * DIM**2 + TOKENS * 2 * DIM * FFN)
ATTENTION = ROWS * 4 * DIM * (TOKENS**2 + TOKENS * TEXT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_blocks_operations_are_those_of_its_matrices_and_attention(checkpointing: bool) -> None:
    """A backward takes twice a forward's products; attention's takes 5/2, since it computes its scores again."""
    forward, replay, *exchanged = each_block(checkpointed=checkpointing)
    assert forward == LINEAR + ATTENTION
    assert replay == (3 + checkpointing) * LINEAR + (3.5 + checkpointing) * ATTENTION
    assert exchanged == [0, 0]


def test_a_sequence_group_divides_a_blocks_operations_and_exchanges_its_tokens() -> None:
    """Text is projected by every rank. Queries, keys, values and outputs are exchanged, in bf16; gradients too."""
    forward, replay, sent, sent_back = each_block(sequence=2)
    text = ROWS * 2 * TEXT * 2 * DIM**2
    assert forward == (LINEAR - text) / 2 + text + ATTENTION / 2
    assert sent == ROWS * 4 * (TOKENS / 2) * DIM * 2
    assert sent_back == 2 * sent
    assert replay > 3 * forward


def test_seconds_are_counts_of_passes_times_operations_over_rates(job: Job) -> None:
    step, foot, plan = count_step(job), job.footprint, reckon(job)
    seconds, _, work = step_seconds(job, plan, UNIT)
    videos = step["samples_per_group"]
    assert seconds["denoising"] == step["forwards"] * foot.forward.operations / 1e6
    assert seconds["replay"] == sum(step["passes"]) * foot.replay.operations / 1e6
    assert seconds["decoding"] == pytest.approx(videos / job.decoded_at_once * job.decoding.operations / 1e6)
    assert seconds["reward"] == videos * 0.5
    share = job.zero.share(sum(job.weights.trained))
    assert seconds["optimizer"] == len(step["passes"]) * 7 * 4 * share / 1e6
    assert work["denoising"] == step["forwards"] * foot.forward.operations
    twice, _, _ = step_seconds(job, plan, replace(UNIT, decode_memory=1e6))
    assert twice["decoding"] - seconds["decoding"] == pytest.approx(
        videos / job.decoded_at_once * job.decoding.moved / 1e6
    )
    doubled = replace(job, ranks=4)
    assert step_seconds(doubled, reckon(doubled), UNIT)[0]["denoising"] == seconds["denoising"] / 2


def test_references_and_old_velocities_take_forwards(job: Job) -> None:
    def extra(loss: LossConfig) -> int:
        return extra_forwards(replace(job, config=replace(job.config, loss=loss)))

    assert extra(LossConfig()) == 0
    assert extra(LossConfig(kl_weight=0.1, kl_reference="previous")) == 0
    assert extra(LossConfig(kl_weight=0.1)) == extra(LossConfig(objective="nft")) == 1
    assert extra(LossConfig(objective="dpo")) == 1
    held = replace(job, config=replace(job.config, loss=LossConfig(kl_weight=0.1)))
    more = step_seconds(held, reckon(held), UNIT)[0]["replay"] - step_seconds(job, reckon(job), UNIT)[0]["replay"]
    assert more == pytest.approx(sum(count_step(job)["passes"]) * job.footprint.forward.operations / 1e6)


def test_differentiated_rewards_take_passes_of_the_last_steps_decodings_and_scorings(job: Job) -> None:
    job = change(job, "optim.updates_per_rollout: 1")
    one, three = (
        replace(job, config=replace(job.config, loss=LossConfig(objective="draft", draft_steps=steps)))
        for steps in (1, 3)
    )
    assert sum(count_step(three)["passes"]) == 3 * sum(count_step(one)["passes"])
    assert one.differentiated is not None
    assert one.differentiated.operations > 2 * one.decoding.operations / one.decoded_at_once
    seconds = [step_seconds(each, reckon(each), UNIT)[0]["replay"] for each in (one, three)]
    passes = 2 * count_step(one)["samples_per_group"] / job.config.rollout.micro_batch_size
    assert seconds[1] - seconds[0] == pytest.approx(passes * job.footprint.replay.operations / 1e6)
    peaks = [reckon(each).phases["replay"] for each in (job, one, three)]
    assert peaks[2]["forward and backward"] == peaks[0]["forward and backward"]
    assert peaks[1]["decoding"] == one.differentiated.peak


def test_reused_guidance_saves_halves_of_untrained_steps(job: Job) -> None:
    """Of eight steps two are trained; at every second one of the others half a forward is saved."""
    often = change(job, "rollout.guidance_every: 2")
    assert Passes.of(often).forwards == Passes.of(job).forwards == count_step(job)["forwards"]
    guided = change(often, "sampler.guidance_scale: 5.0")
    assert Passes.of(guided).forwards == pytest.approx(count_step(guided)["forwards"] * (1 - 6 / 8 / 4))


def seconds_of_steps(steps: int, rollout: float, reward: float, update: float) -> float:
    """Of steps between two pauses, by a simulation of the rank and of its scoring thread."""
    rank = sampled = rollout
    scored = 0.0
    for step in range(steps):
        scored = max(scored, sampled) + reward
        if step + 1 < steps:
            sampled = rank = rank + rollout
        rank = max(rank, scored) + update
    return rank


@pytest.mark.parametrize("reward", [0.5, 3.0, 4.0, 20.0])
def test_sampling_ahead_hides_the_shorter_of_rewards_and_all_else(job: Job, reward: float) -> None:
    """A pause shows all rewards of a step or, as the plan assumes no less, only a part where they are shorter."""
    rollout, update, steps, pauses = 1.0, 3.0, 24, 4
    run = replace(job.config.run, num_steps=steps, save_every=6)
    config = replace(job.config, run=run, rollout=replace(job.config.rollout, sample_ahead=True))
    parts = {"denoising": rollout, "reward": reward, "replay": update}
    predicted = steps * (sum(parts.values()) - seconds_overlapped(config, parts))
    simulated = pauses * seconds_of_steps(steps // pauses, rollout, reward, update)
    shorter = reward < rollout + update
    assert -1e-9 <= predicted - simulated <= (pauses * reward if shorter else 1e-9)
    whole = replace(job, config=config)
    cost = bill(whole, reckon(whole), UNIT)
    other = bill(change(whole, "rollout.sample_ahead: false"), reckon(whole), UNIT)
    assert cost.step == pytest.approx(other.step - cost.overlapped)
    assert other.overlapped == 0
    assert cost.run < other.run


def test_what_is_not_fetched_ahead_is_waited_for(job: Job) -> None:
    """Half of the weights and of the fp32 gradients come from the other rank; compute is long in these rates."""
    step, weights, slow = count_step(job), job.weights.elements, replace(UNIT, forward=1.0, replay=1.0)
    passes, forwards = sum(step["passes"]), step["forwards"]
    gather, gradients = weights / 2 * 2 / 1e6, sum(job.weights.trained) / 2 * 4 / 1e6

    def waited(job: Job, rates: Rates) -> tuple[float, float, float, float]:
        seconds, hidden, _ = step_seconds(job, reckon(job), rates)
        return seconds["gather (rollout)"], seconds["gather (update)"], seconds["reduction"], hidden

    total = (forwards + 2 * passes) * gather + passes * gradients
    assert waited(job, slow) == pytest.approx((0, 0, 0, total))
    alone = change(job, "zero_optimization.stage3_prefetch_bucket_size: 0")
    assert waited(alone, slow)[:3] == pytest.approx((forwards * gather, 2 * passes * gather, 0))
    assert waited(change(alone, "zero_optimization.overlap_comm: false"), slow)[2] == pytest.approx(passes * gradients)
    half = change(alone, "policy.checkpointed_share: 0.5")
    assert waited(half, slow)[1] == pytest.approx(1.5 * passes * gather), "half of the blocks are fetched once"
    kept = change(alone, "policy.gradient_checkpointing: false")
    assert waited(kept, slow)[1] == pytest.approx(passes * gather), "activations keep the weights for the backward"
    whole = change(change(job, "rollout.parameters: gathered"), "optim.parameters: gathered")
    assert waited(whole, slow)[:2] == pytest.approx((gather, len(step["passes"]) * gather))
    once = change(whole, "optim.average: update")
    assert waited(once, slow)[2] == pytest.approx(len(step["passes"]) * gradients)
    quick = replace(UNIT, forward=1e30, replay=1e30)
    assert waited(job, quick) == pytest.approx((forwards * gather, 2 * passes * gather, passes * gradients, 0))
    for stage, reductions in ((1, len(step["passes"])), (2, passes)):
        found = waited(change(job, f"zero_optimization.stage: {stage}"), quick)
        assert found == pytest.approx((0, len(step["passes"]) * gather, reductions * gradients, 0)), stage


def test_auto_gathers_for_an_update_where_the_first_left_room(job: Job) -> None:
    auto = change(job, "optim.parameters: auto")
    large, small = (reckon(replace(auto, gigabytes=size)).gathers_update for size in (80, 3))
    assert large
    assert not small


def test_a_sequence_group_waits_for_its_exchanges(job: Job) -> None:
    two = change(job, "parallel.sequence: 2")
    seconds = step_seconds(two, reckon(two), UNIT)[0]
    assert two.footprint.forward.exchanged > 0
    expected = count_step(two)["forwards"] * two.footprint.forward.exchanged / 2 / 1e6
    assert seconds["sequence group (rollout)"] == pytest.approx(expected)


def test_a_plan_has_the_limits_that_the_engine_derives(job: Job) -> None:
    large = replace(job)
    large.__dict__["weights"] = Weights(trained=(10**9, 10**9), frozen=(), largest_block=4 * 10**8)
    settings, small = large.zero.settings, job.zero.settings
    assert (settings.prefetch_bucket_size, settings.max_live_parameters) == (4 * 10**8, 16 * 10**8)
    assert (small.prefetch_bucket_size, small.max_live_parameters) == (5 * 10**7, 10**9)


def test_the_run_has_its_steps_evaluations_and_priors(job: Job) -> None:
    config = replace(job.config, prior=replace(job.config.prior, kind="reference", samples=4))
    job = replace(job, config=replace(config, bpgo=replace(config.bpgo, zeta=0.5)), prompts={"train": 6, "heldout": 10})
    cost, evaluation = bill(job, reckon(job), UNIT), job.config.evaluation
    steps = job.config.run.num_steps
    assert cost.run == pytest.approx(steps * cost.step / 3600 + cost.evaluations * cost.evaluation)
    each = job.footprint.forward.operations / 2 / 1e6  # a video's forward, in micro-batches of two
    after = job.decoding.operations / job.decoded_at_once / 1e6 + 0.5
    videos = 10 * evaluation.samples_per_prompt / 2
    assert 3600 * cost.evaluation == pytest.approx(videos * (evaluation.num_steps * each + after))
    assert cost.prior_prompts == 6
    prior = count_priors(job.config, 2, split_prompts=6)
    assert prior.videos == 6 * 4
    forwards = prior.forwards * prior.micro_batch_size * each
    assert 3600 * cost.priors == pytest.approx(forwards + prior.videos / 2 * after)
    assert cost.hours == cost.run + cost.priors
    guided = replace(evaluation, guidance_scale=5.0)
    doubled = replace(job, config=replace(job.config, evaluation=guided))
    expected = videos * (2 * evaluation.num_steps * each + after)
    assert 3600 * bill(doubled, reckon(doubled), UNIT).evaluation == pytest.approx(expected)
    without = replace(job, config=replace(job.config, evaluation=replace(evaluation, rewards={})))
    assert bill(without, reckon(without), UNIT).evaluation == 0


def test_evaluations_are_counted_before_during_and_after(job: Job) -> None:
    def count(every: int, weights: str = "raw") -> int:
        evaluation = replace(job.config.evaluation, every=every, weights=weights)
        return count_evaluations(
            change(replace(job, config=replace(job.config, evaluation=evaluation)), "run.num_steps: 100")
        )

    assert [count(0), count(50), count(40), count(50, "both")] == [2, 3, 4, 5]


def test_checkpoints_hold_fp32_weights_moments_and_average(job: Job) -> None:
    trained = sum(job.weights.trained)
    assert checkpoint_bytes(job.zero, job.weights, job.config) == 12 * trained
    average = change(job, "ema.decay: 0.9")
    assert checkpoint_bytes(average.zero, average.weights, average.config) == 16 * trained
    first = change(job, "zero_optimization.stage: 1")
    assert checkpoint_bytes(first.zero, first.weights, first.config) == 14 * trained
    kept = job
    for words in ("run.num_steps: 100", "run.save_every: 10", "run.keep_checkpoints: 2", "run.keep_every: 50"):
        kept = change(kept, words)
    cost = bill(kept, reckon(kept), UNIT)
    assert (cost.checkpoint, cost.kept) == (12 * trained, 5 * 12 * trained), "two, the one being written, two forever"


def test_a_host_holds_one_tensor_or_the_whole_model_while_loading(job: Job) -> None:
    plan, elements = reckon(job), job.weights.elements
    assert host_saving(plan) == HOST_PROCESS + plan.host["checkpoint"]
    large = replace(job, stated_reward=RewardSize(0, 10**9))
    assert host_loading(large, reckon(large)) == HOST_PROCESS + 2 * 10**9, "read, and held while it is offloaded"
    first = change(job, "zero_optimization.stage: 1")
    assert host_loading(first, reckon(first)) >= HOST_PROCESS + 2 * elements


def test_the_card_is_named_or_the_smallest_that_is_large_enough() -> None:
    assert card_of("a100-40gb", 80) is CARDS["a100-40gb"]
    assert [card_of(None, size) for size in (24, 40, 48, 80, 141, 500, None)] == [
        CARDS[name] for name in ("rtx4090", "a100-40gb", "l40s", "h100", "h200", "h200", "h100")
    ]
    with pytest.raises(ConfigError, match="--card is 'h1000'"):
        card_of("h1000", None)


def test_rates_are_shares_of_a_cards_figures() -> None:
    half = rates_of(CARDS["h100"], 0.4, bf16=True)
    assert (half.forward, half.decode) == pytest.approx((395.6e12, 197.8e12))
    assert rates_of(CARDS["h100"], 0.4, bf16=False).forward == pytest.approx(26.8e12), "torch uses no TF32 for it"
    assert half.between(8) == pytest.approx(0.7 * 450e9)
    assert half.between(32) == pytest.approx(0.7 * 400e9), "eight network cards of 50 GB/s a host"
    assert rates_of(CARDS["h100"], 0.4, bf16=True, network_gbps=100).between(32) == pytest.approx(0.7 * 100e9)


def test_measured_rates_are_written_and_read(job: Job, tmp_path: Path) -> None:
    measured, file = calibrate(job, UNIT, torch.device("cpu")), tmp_path / "rates.json"
    assert measured.source.startswith("measured on CPU")
    assert all(value > 1e6 for value in (measured.forward, measured.replay, measured.decode, measured.memory))
    assert measured.link == UNIT.link
    write_rates(file, measured)
    assert read_rates(file) == measured
    for wrong, words in (({"speed": 1}, "holds no rates"), ({"forward": 0}, "forward must be above 0")):
        file.write_text(json.dumps({**vars(measured), **wrong}))
        with pytest.raises(ConfigError, match=words):
            read_rates(file)


def test_the_command_prints_the_bill(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--config", str(RECIPE), "--gpus", "2", "--card", "a100-40gb", "--price", "2"]
    assert command.main(words) == 0
    shown = capsys.readouterr().out
    assert "40 GB: fits" in shown
    assert "Seconds of a step on 2 GPUs (A100 SXM 40 GB, 40% of its peak)" in shown
    assert "Assumed, nothing of it measured" in shown
    assert command.main([*words, "--mfu", "0.2", "--json"]) == 0
    slow = json.loads(capsys.readouterr().out)
    assert command.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert slow["seconds"]["denoising"] == pytest.approx(2 * found["seconds"]["denoising"])
    assert found["cost"] == pytest.approx(2 * 2 * found["hours"]["all"])
    assert found["seconds"]["step"] == pytest.approx(
        sum(found["seconds"][name] for name in ("rollout", "reward", "update"))
    )
    assert command.main([*words, "--calibrate"]) == 2
    assert "name the file that it writes with --rates" in capsys.readouterr().err
    assert command.main([*words, "--rates", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
