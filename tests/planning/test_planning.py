"""Memory plans: counted tensors, ZeRO's sharding, what fits, and advice."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.utils._pytree import tree_map_only

from bpgo_video.commands import plan as command
from bpgo_video.config.bpgo import Config, ConfigError, PolicyConfig, VideoConfig
from bpgo_video.config.policy import LoraConfig
from bpgo_video.distributed.engine import zero_settings
from bpgo_video.planning.advice import CHANGES, advise, possible, spare
from bpgo_video.planning.fake import Allocations
from bpgo_video.planning.footprint import Weights, decoding, footprint, measure, transformer_inputs, vae_bytes
from bpgo_video.planning.job import Job, change, count_step
from bpgo_video.planning.memory import RUNTIME, Plan, reckon, room
from bpgo_video.planning.models import Model, diffusers_class, find_model, known_models, policy_of
from bpgo_video.planning.zero import Zero, missing_weights, on_gpu, zero_at_rest, zero_at_work
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import checkpoint_blocks, repeated_blocks
from tests.made.random_wan import random_wan
from tests.made.recipes import RECIPE, small_recipe

MODEL = Model(
    name="small",
    source="this test",
    index={"_class_name": "WanPipeline"},
    transformers=("transformer",),
    transformer={
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 128, "num_layers": 2,
    },
    vae={
        "_class_name": "AutoencoderKLWan", "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1,
        "temperal_downsample": [True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
        "scale_factor_spatial": 4,
    },
)  # fmt: skip
POLICY = policy_of(MODEL, family=None, max_sequence_length=8)
VIDEO = VideoConfig(num_frames=13, height=64, width=64, fps=8.0)  # latents of 4 x 16 x 16
BF16 = {"bf16": {"enabled": True}}


def zero(stage: int, ranks: int, **settings: object) -> Zero:
    return Zero.of({**BF16, "zero_optimization": {"stage": stage, **settings}}, ranks)


@pytest.fixture
def job(recipe: Config) -> Job:
    """The demo recipe on two ranks, with the model of these tests."""
    config = replace(
        recipe,
        video=VideoConfig(num_frames=13, height=64, width=64, fps=8.0),
        rollout=replace(recipe.rollout, micro_batch_size=2, parameters="sharded"),
    )
    return Job(config, {**BF16, "zero_optimization": {"stage": 3}}, ranks=2, model=MODEL)


def test_live_tensors_are_counted_once_until_they_are_freed() -> None:
    weight = torch.zeros(100)
    with Allocations([weight]) as counted:
        first = torch.zeros(1000)
        view = first.view(10, 100)[:5]
        weight.view(10, 10).t()
        torch.zeros(10**6, device="meta")
        assert counted.live == 4000
        first = first + 1
        assert counted.live == 8000, "a view keeps its storage alive"
        del view
        assert (counted.live, counted.mark()) == (4000, 8000)
        del first
        assert (counted.live, counted.peak) == (0, 4000)


@pytest.mark.parametrize("checkpointing", [0, 0.5, 1])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_dry_run_counts_the_memory_of_real_tensors(checkpointing: float, rank: int) -> None:
    """Compared with the same forward and backward on real tensors, counted in the same way."""
    lora = LoraConfig(rank=rank)
    planned = footprint(POLICY, VIDEO, 2, torch.float32, checkpointed=checkpointing, lora=lora)
    module: Any = WanTransformer3DModel.from_config(dict(MODEL.transformer))
    if rank:
        add_lora(module, lora, seed=0)
    if checkpointing:
        checkpoint_blocks(module, checkpointing)
    shapes = transformer_inputs(POLICY, VIDEO, 2, torch.float32)
    real = tree_map_only(torch.Tensor, lambda value: torch.zeros(value.shape, dtype=value.dtype), shapes)
    forward, replay = measure(module, real)
    assert planned.forward.peak == pytest.approx(forward.peak, rel=0.01)
    assert planned.replay.peak == pytest.approx(replay.peak, rel=0.01)
    assert sum(planned.weights.trained) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert planned.weights.elements == sum(p.numel() for p in module.parameters())


def test_checkpointing_and_sequence_groups_reduce_the_activations() -> None:
    large = replace(VIDEO, num_frames=29, height=128, width=128)
    plain, recomputed, shared = (
        footprint(POLICY, large, 2, torch.float32, **settings).replay.peak
        for settings in ({}, {"checkpointed": 1}, {"checkpointed": 1, "sequence": 4})
    )
    assert recomputed < 0.7 * plain
    assert recomputed / 4 < shared < recomputed / 3, "the video's tokens are divided, but not the text's"
    with pytest.raises(ConfigError, match="attention heads"):
        footprint(POLICY, large, 2, torch.float32, sequence=3)


def test_slicing_decodes_one_video_at_a_time() -> None:
    latents = (4, 2, 16, 16)
    one, four = (decoding(POLICY, latents, samples).peak for samples in (1, 4))
    sliced = decoding(POLICY, latents, 4, slicing=True).peak
    assert four == pytest.approx(4 * one, rel=0.05)
    assert sliced < 0.6 * four


def test_a_vae_in_bfloat16_takes_about_half_of_the_memory() -> None:
    sizes = {dtype: decoding(POLICY, (4, 2, 16, 16), 2, dtype=dtype).peak for dtype in (torch.float32, torch.bfloat16)}
    assert 0.5 <= sizes[torch.bfloat16] / sizes[torch.float32] < 0.8, "norms and upsampling are computed in fp32"
    assert vae_bytes(POLICY, torch.bfloat16) == vae_bytes(POLICY, torch.float32) / 2


def test_published_models_have_the_parameter_counts_of_their_cards() -> None:
    """Counts are in billions, as in model names and cards."""
    cards = {
        "wan2.1-t2v-1.3b": 1.42,
        "wan2.1-t2v-14b": 14.29,
        "cogvideox-2b": 1.69,
        "ltx-video": 1.92,
        "mochi-1": 10.03,
        "hunyuanvideo-1.5-480p-t2v": 8.33,
        "hunyuanvideo-1.5-480p-i2v": 8.33,
    }
    for name, billions in cards.items():
        model = find_model(name)
        with torch.device("meta"):
            module = diffusers_class(model.transformer).from_config(dict(model.transformer))
        assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, abs=0.006), name


def test_every_known_model_names_classes_and_its_source() -> None:
    for name, model in known_models().items():
        assert diffusers_class(model.transformer)
        assert diffusers_class(model.vae)
        assert model.source
        assert find_model(name) is model
    assert find_model("Wan-AI/Wan2.2-I2V-A14B-Diffusers").transformers == ("transformer", "transformer_2")
    with pytest.raises(ConfigError, match=r"known without a download are .*hunyuanvideo"):
        find_model("no/such/model")


def test_a_published_model_is_planned_with_the_shapes_of_its_family() -> None:
    """For TI2V-5B with images, one latent frame is given: it is not sampled, but passes through transformer and VAE."""
    video = VideoConfig(num_frames=121, height=704, width=1280, fps=24.0)
    model = find_model("wan2.2-ti2v-5b")

    def shapes(family: str | None) -> tuple[Any, ...]:
        policy = PolicyConfig("wan2.2-ti2v-5b", 512, family=family)
        config = replace(small_recipe(Path("run"), Path("shards")), policy=policy, video=video)
        job = Job(config, BF16, ranks=1, model=model)
        return job.latents, job.decoded, job.policy.given_frames

    whole = (48, 31, 44, 80)
    assert shapes(None) == (whole, whole, 0)
    assert shapes("WanImageToVideoPipeline") == ((48, 30, 44, 80), whole, 1)
    for name, each in known_models().items():
        assert policy_of(each, None, 512).pipeline_name == each.index["_class_name"], name
    with pytest.raises(ConfigError, match="'pathlib:Path' is no subclass of"):
        policy_of(model, "pathlib:Path", 512)


def test_sizes_that_the_policy_refuses_are_not_planned(job: Job) -> None:
    odd = replace(job.config, video=replace(job.config.video, height=68))
    with pytest.raises(ConfigError, match=r"video.height is 68; this policy needs a multiple of 8"):
        reckon(replace(job, config=odd))


def test_shapes_are_read_from_a_model_folder(tmp_path: Path) -> None:
    folder = random_wan(tmp_path / "wan", images=True, image_encoder=True)
    model = find_model(str(folder))
    assert model.transformers == ("transformer",)
    assert model.transformer["in_channels"] == 12
    assert 5_000 < model.image_encoder_parameters < 50_000
    assert model.folder == folder


WEIGHTS = Weights(trained=(6_000_000, 2_000_000), frozen=(4_000_000,), largest_block=1_000_000)


def test_zero_3_shards_everything_and_zero_1_shards_the_optimizer(recipe: Config) -> None:
    """AdamW in bf16: per weight 2 bytes, 4 for its gradient, 4 for its master, 8 for its moments; plus fp32 buckets."""
    few = {"reduce_bucket_size": 1000}
    third = zero_at_rest(zero(3, 4, stage3_param_persistence_threshold=0, **few), WEIGHTS, recipe)
    assert sum(on_gpu(third, "update").values()) == 12_000_000 * 2 / 4 + 8_000_000 * (4 + 4 + 8) / 4 + 4000
    first = zero_at_rest(zero(1, 4), WEIGHTS, recipe)
    assert sum(on_gpu(first, "update").values()) == 12_000_000 * 2 + 8_000_000 * (4 + 8) / 4
    whole = on_gpu(zero_at_work(zero(1, 4, **few), WEIGHTS, recipe), "replay")
    assert whole == {"gradients": 32_000_000, "gradient bucket": 4000}


def test_offload_moves_all_bytes_to_the_host(recipe: Config) -> None:
    config = replace(recipe, ema=replace(recipe.ema, decay=0.9))
    whole = sum(part.size for part in zero_at_rest(zero(3, 4), WEIGHTS, config))
    for offload in ({"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}):
        moved = zero_at_rest(zero(3, 4, **offload), WEIGHTS, config)
        on_host = sum(part.size for part in moved if part.on_host)
        assert 0 < on_host == whole - sum(on_gpu(moved, "replay").values())


def test_live_weights_are_bounded_by_the_json_and_by_the_model(recipe: Config) -> None:
    few = {"stage3_max_live_parameters": 10**6, "stage3_max_reuse_distance": 10**6}

    def fetched(zero: Zero, phase: str = "replay", **how: bool) -> int:
        return on_gpu(zero_at_work(zero, WEIGHTS, recipe, **how), phase).get("weights fetched", 0)

    assert fetched(zero(3, 4, **few)) == fetched(zero(3, 4, **few), "denoise") == 2 * (10**6 + 10**6)
    assert fetched(zero(3, 4)) == 2 * 12_000_000, "DeepSpeed's bound is 1e9 elements"
    assert fetched(zero(3, 4, **few), keeps=1.0) == 2 * 12_000_000, "autograd saves them as views"
    assert fetched(zero(2, 4)) == missing_weights(zero(2, 4), WEIGHTS) == 0
    assert fetched(zero(3, 4, **few), "decode", gathers=True) == missing_weights(zero(3, 4), WEIGHTS) == 2 * 9_000_000


def test_deepspeeds_defaults_are_used() -> None:
    settings = zero_settings({"zero_optimization": {"stage": 3}})
    assert (settings.reduce_bucket_size, settings.max_live_parameters) == (500_000_000, 1_000_000_000)


def test_a_plan_follows_its_settings(job: Job) -> None:
    plan = reckon(job)
    assert list(plan.phases) == ["denoise", "decode", "replay", "update"]
    gathering = reckon(
        replace(job, config=replace(job.config, rollout=replace(job.config.rollout, parameters="gathered")))
    )
    assert list(gathering.phases) == ["gather", "denoise", "decode", "replay", "update"]
    whole = sum(job.weights.trained) * job.zero.weight_bytes  # few enough to be gathered at once
    assert gathering.phases["gather"]["weights on their way"] == whole
    for phase in ("gather", "denoise"):
        assert gathering.phases[phase]["weights fetched"] == whole // 2
    assert not plan.gathers

    def part(changed: Job, phase: str, name: str) -> int:
        return reckon(changed).phases[phase].get(name, 0)

    def with_rollout(**values: object) -> Job:
        return replace(job, config=replace(job.config, rollout=replace(job.config.rollout, **values)))

    assert reckon(with_rollout(parameters="gathered")).gathers
    offloaded = reckon(with_rollout(offload_trajectories=True))
    assert offloaded.host["trajectories"] == part(job, "denoise", "trajectories") > 0
    assert "trajectories" not in offloaded.phases["replay"]
    waiting = part(job, "denoise", "videos to be scored")
    assert part(with_rollout(score_ahead=0), "denoise", "videos to be scored") == waiting / 3
    assert waiting == 3 * 2 * 13 * 3 * 64 * 64 * 4
    ahead = with_rollout(sample_ahead=True)  # a rank's eight chunks of two samples wait, also during the update
    assert part(ahead, "denoise", "videos to be scored") == 9 * waiting / 3
    assert part(ahead, "update", "videos to be scored") == 8 * waiting / 3
    assert part(job, "update", "videos to be scored") == 0
    assert part(ahead, "replay", "trajectories") == 2 * part(job, "replay", "trajectories")
    resting = replace(job, config=replace(job.config, policy=replace(job.config.policy, frozen_rest_on="cpu")))
    assert part(resting, "replay", "VAE and image encoder") == 0
    assert part(resting, "decode", "VAE and image encoder") == part(job, "decode", "VAE and image encoder") > 0


def test_trajectories_are_counted_for_the_samples_of_one_rank(job: Job) -> None:
    steps, elements = job.config.sampler.num_steps, 4 * 4 * 16 * 16
    samples = job.config.rollout.prompts_per_step * job.config.rollout.group_size / 2
    assert reckon(job).phases["replay"]["trajectories"] == samples * (steps + 1) * elements * 4
    grouped = replace(job, config=replace(job.config, parallel=replace(job.config.parallel, sequence=2)))
    assert reckon(grouped).phases["replay"]["trajectories"] == 2 * samples * (steps + 1) * elements * 4


def test_experts_are_sharded_together_and_one_may_be_frozen(job: Job) -> None:
    two = replace(job, model=replace(MODEL, transformers=("transformer", "transformer_2")))
    one_trained = replace(two, config=replace(job.config, policy=replace(job.config.policy, trained=("transformer",))))
    assert two.weights.elements == one_trained.weights.elements == 2 * job.weights.elements
    assert sum(two.weights.trained) == 2 * sum(one_trained.weights.trained) == 2 * sum(job.weights.trained)
    assert reckon(one_trained).peak < reckon(two).peak


def test_gathering_depends_on_free_memory(job: Job) -> None:
    auto = replace(job.config, rollout=replace(job.config.rollout, parameters="auto"))
    large, small = (reckon(replace(job, config=auto, gigabytes=size)).gathers for size in (80, 3))
    assert large
    assert not small


def test_advice_leads_to_a_plan_that_fits_or_states_that_none_does(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = reckon(job)
    monkeypatch.setattr(Plan, "fits", lambda self, size: self.peak <= size)
    changes, enough = advise(job, plan, plan.peak * 0.9)
    assert enough.peak <= plan.peak * 0.9
    assert changes
    assert set(changes) <= set(CHANGES)
    assert reckon(reduce(change, changes, job)) == enough, "the settings that are printed are those that were tried"
    changes, hopeless = advise(job, plan, 1)
    assert 1 < hopeless.peak < plan.peak
    assert change(job, "--gpus 4") == replace(job, ranks=4)
    assert advise(job, plan, plan.peak) == ([], plan), "only necessary settings are changed"


@pytest.mark.slow
def test_memory_that_is_left_free_recomputes_fewer_blocks(job: Job) -> None:
    model = replace(MODEL, transformer={**MODEL.transformer, "num_layers": 10})
    video = replace(job.config.video, num_frames=81, height=256, width=256)
    job = replace(job, model=model, config=replace(job.config, video=video))
    for words in ("zero_optimization.reduce_bucket_size: 1_000", "policy.gradient_checkpointing: true"):
        job = change(job, words)
    plan = reckon(job)
    kept = [reckon(change(job, f"policy.checkpointed_share: {share}")) for share in (0.9, 0.6, 0.5)]
    assert plan.totals["replay"] < kept[0].totals["replay"] < kept[1].totals["replay"] == kept[1].peak
    size = next(size for size in (0.01 * i for i in range(10_000)) if kept[1].fits(size))
    assert not kept[2].fits(size)
    words, changed, found = spare(job, plan, size)
    assert found == reckon(change(job, words))
    assert found.fits(size)
    assert words in ("policy.checkpointed_share: 0.6", "policy.checkpointed_share: 0.7"), "an estimate, one block off"
    assert changed.footprint.replay.operations < job.footprint.replay.operations
    assert spare(changed, found, size) is None
    assert spare(change(job, "policy.gradient_checkpointing: false"), plan, size) is None


def test_changes_that_break_a_rule_are_not_advised(job: Job) -> None:
    odd = replace(job, ranks=3, config=replace(job.config, rollout=replace(job.config.rollout, prompts_per_step=3)))
    assert reckon(odd).peak
    assert possible(replace(odd, ranks=2 * 3 * 64)) is None


def test_the_usable_memory_is_less_than_that_of_the_card() -> None:
    assert room(80) == 76 * 10**9 - RUNTIME


def test_a_dry_run_counts_the_work_of_training(job: Job) -> None:
    rollout = job.config.rollout
    found = count_step(job)
    samples = rollout.prompts_per_step * rollout.group_size
    assert (found["ranks"], found["groups"], found["samples"]) == (2, 2, samples)
    assert found["micro_batches"] == samples / 2 / rollout.micro_batch_size
    later = [math.comb(6 - step, 2) / math.comb(7, 2) for step in range(5)]  # two of seven, of one prompt: P(all later)
    shared, prefix = sum(later), sum(1 - (1 - p) ** 4 for p in later)
    assert found["forwards"] == pytest.approx(
        found["micro_batches"] * (8 - shared) + prefix * 2 / rollout.micro_batch_size
    ), "every rank has samples of all four prompts, and computes the prefixes of two until the longest one's end"
    apart = replace(job, config=replace(job.config, rollout=replace(rollout, same_start=False)))
    assert count_step(apart)["forwards"] == found["micro_batches"] * job.config.sampler.num_steps
    assert sum(found["passes"]) == found["micro_batches"] * job.config.sampler.trained_count
    assert len(found["passes"]) == job.config.optim.updates_per_rollout
    with pytest.raises(ConfigError, match="do not divide"):
        count_step(replace(job, ranks=5))


def test_the_command_plans_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(RECIPE), "--gpus", "2"]
    assert command.main([*arguments, "--gigabytes", "24", "80"]) == 0
    shown = capsys.readouterr().out
    assert "24 GB: fits" in shown
    assert not re.search(r"\b0\.0+ [GM]B", shown), "each size has a unit that shows it"
    assert "forward and backward" in shown
    assert command.main([*arguments, "--gigabytes", "24", "--json", "--rollout.group-size", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"]["samples"] == 64
    assert found["fits"] == {"24": True}
    assert found["phases"]["replay"]["total"] == sum(
        size for name, size in found["phases"]["replay"].items() if name != "total"
    )


def test_the_command_names_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--config", str(RECIPE), "--gpus", "5"]) == 2
    assert "do not divide" in capsys.readouterr().err
    assert command.main(["--model", "none/such", "--gpus", "8"]) == 2
    assert "known without a download" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--model", "ltx-video", "--gpus", "8", "--size", "large"])
    assert "height x width x frames" in capsys.readouterr().err


def planned_job(words: str) -> Job:
    return command.job_of(*command.parser().parse_known_args(words.split()))


@pytest.mark.parametrize("base", [f"--config {RECIPE}", "--model ltx-video"])
def test_short_flags_are_those_of_the_recipe(base: str) -> None:
    values = {"--family": "LTXPipeline", "--guidance": "2.0", "--no-checkpointing": ""}
    for short, flag in command.SHORT.items():
        value = values.get(short, "8")
        assert planned_job(f"{base} --gpus 8 {short} {value}") == planned_job(f"{base} --gpus 8 {flag} {value}")
    sized = planned_job(f"{base} --gpus 8 --size 128x256x17 --zero 2 --offload all")
    assert (sized.config.video.height, sized.config.video.width, sized.config.video.num_frames) == (128, 256, 17)
    assert (sized.zero.stage, sized.zero.on_host("offload_optimizer"), sized.zero.on_host("offload_param")) == (2, 1, 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--gpus 0", "--gpus: 0 must be 1 or more"),
        ("--gpus -1", "--gpus: -1 must be 1 or more"),
        ("--gpus 1 --gigabytes 0", "--gigabytes: 0 must be 1 or more"),
        ("--gpus 1 --reward-gigabytes -1", "--reward-gigabytes: -1.0 must be 0 or more"),
        ("--gpus 1 --mfu 0", "--mfu: 0.0 must be above 0, and at most 1"),
        ("--gpus 1 --link-gbps 0", "--link-gbps: 0.0 must be above 0"),
        ("--gpus 1 --price -1", "--price: -1.0 must be 0 or more"),
        ("--gpus 1 --sequence 0", "parallel.sequence: Input should be greater than or equal to 1"),
        ("--gpus 1 --prompts 0", "rollout.prompts_per_step: Input should be greater"),
        ("--gpus 1 --group-size 0", "rollout.group_size: Input should be greater"),
        ("--gpus 1 --micro-batch=-2", "rollout.micro_batch_size: Input should be greater"),
        ("--gpus 1 --rollout.group-sise 4", "--rollout.group-sise: unknown flag"),
        ("--gpus 1 --lora-rank=-1", "policy.lora.rank: Input should be greater than or equal to 0 (given: -1)"),
        ("--gpus 1 --guidance 0.5", "sampler.guidance_scale: Input should be greater than or equal to 1"),
        ("--gpus 1 --size 480x0x81", "video.width: Input should be greater than or equal to 1 (given: 0)"),
    ],
)
def test_invalid_numbers_are_named(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = command.main(["--model", "ltx-video", *flags.split()])
    except SystemExit as stopped:  # messages of argparse
        code = int(stopped.code or 0)
    assert code == 2
    assert words in capsys.readouterr().err


def test_a_supervised_recipe_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([str(RECIPE.with_name("tiny_wan_sft.yaml")), "--gpus", "2"])
    assert stopped.value.code == 2
    assert "is a recipe of kind 'sft'; this command takes recipes of kind 'bpgo'" in capsys.readouterr().err


def test_the_command_fails_where_nothing_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Plan({"replay": {"all": 10**10}}, {}, True)
    monkeypatch.setattr("bpgo_video.planning.report.advise", lambda job, plan, size: (["more"], changed))
    arguments = ["--config", str(RECIPE), "--gpus", "2", "--gigabytes", "2"]
    assert command.main(arguments) == 1
    assert "even so it does not fit 2 GB (then 10.0 GB):\n  more\nTake a smaller video" in capsys.readouterr().out


def test_a_model_without_a_recipe_gets_defaults() -> None:
    job = planned_job("--model ltx-video --gpus 8 --sequence 2 --zero 2")
    assert job.config.policy.max_sequence_length == 128
    assert job.config.rollout.prompts_per_step == 1, "8 samples fill 4 groups"
    assert job.config.policy.gradient_checkpointing
    assert (job.config.policy.family, job.zero.stage, job.zero.weight_bytes) == (None, 2, 2)
    assert planned_job("--model ltx-video --gpus 64 --micro-batch 2").config.rollout.prompts_per_step == 16


def test_blocks_are_the_module_lists_of_a_model() -> None:
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    assert repeated_blocks(module) == list(module["blocks"])


@pytest.mark.parametrize(("stage", "whole"), [(3, 0), (2, 2)])
def test_the_copy_that_a_checkpoint_is_written_from_takes_memory_of_the_host(job: Job, stage: int, whole: int) -> None:
    job = replace(job, ds_config={**BF16, "zero_optimization": {"stage": stage}})
    trained = sum(job.weights.trained)
    assert reckon(job).host["checkpoint"] == 3 * 4 * (trained // 2) + whole * trained
    blocking = replace(job.config, run=replace(job.config.run, save_async=False))
    assert not reckon(replace(job, config=blocking)).host.get("checkpoint")
