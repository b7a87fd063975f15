"""Memory plans: counted tensors, ZeRO's sharding, what fits, and advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.utils._pytree import tree_map_only

from bpgo_video.commands import plan as command
from bpgo_video.config.bpgo import Config, ConfigError, LoraConfig, PolicyConfig, VideoConfig
from bpgo_video.config.command_line import load_recipe
from bpgo_video.config.reading import config_from_dict
from bpgo_video.distributed.engine import zero_settings
from bpgo_video.training.plan import CHANGES, RUNTIME, Advice, Job, Plan, advise, count_step, possible, reckon, room
from bpgo_video.training.plan_models import Model, find_model, known_models, policy_of
from bpgo_video.training.plan_rehearsal import (
    Allocations,
    add_lora,
    decoding_bytes,
    diffusers_class,
    footprint,
    measure,
    repeated_blocks,
    transformer_inputs,
)
from bpgo_video.training.plan_zero import (
    Weights,
    Zero,
    during_backward,
    held_at_rest,
    live_weights,
    missing_weights,
)
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_dry_run_counts_the_memory_of_real_tensors(checkpointing: bool, rank: int) -> None:
    """Compared with the same forward and backward on real tensors, counted in the same way."""
    lora = LoraConfig(rank=rank)
    planned = footprint(POLICY, VIDEO, 2, torch.float32, gradient_checkpointing=checkpointing, lora=lora)
    module: Any = WanTransformer3DModel.from_config(dict(MODEL.transformer))
    if rank:
        add_lora(module, lora, seed=0)
    if checkpointing:
        module.enable_gradient_checkpointing()
    shapes = transformer_inputs(POLICY, VIDEO, 2, torch.float32)
    real = tree_map_only(torch.Tensor, lambda value: torch.zeros(value.shape, dtype=value.dtype), shapes)
    forward, replay = measure(module, real)
    assert planned.forward == pytest.approx(forward, rel=0.01)
    assert planned.replay == pytest.approx(replay, rel=0.01)
    assert sum(planned.trained) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(planned.trained + planned.frozen) == sum(p.numel() for p in module.parameters())


def test_checkpointing_and_sequence_groups_reduce_the_activations() -> None:
    large = replace(VIDEO, num_frames=29, height=128, width=128)
    plain, recomputed, shared = (
        footprint(POLICY, large, 2, torch.float32, **settings).replay
        for settings in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "sequence": 4})
    )
    assert recomputed < 0.7 * plain
    assert recomputed / 4 < shared < recomputed / 3, "the video's tokens are divided, but not the text's"
    with pytest.raises(ConfigError, match="attention heads"):
        footprint(POLICY, large, 2, torch.float32, sequence=3)


def test_slicing_decodes_one_video_at_a_time() -> None:
    latents = (4, 2, 16, 16)
    one, four = (decoding_bytes(POLICY, latents, samples) for samples in (1, 4))
    sliced = decoding_bytes(POLICY, latents, 4, slicing=True)
    assert four == pytest.approx(4 * one, rel=0.05)
    assert sliced < 0.6 * four


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


def test_zero_3_shards_everything_and_zero_1_shards_the_optimiser(recipe: Config) -> None:
    """AdamW in bf16: per weight 2 bytes, 4 for its gradient, 4 for its master, 8 for its moments; plus fp32 buckets."""
    third = held_at_rest(
        zero(3, 4, reduce_bucket_size=1000, stage3_param_persistence_threshold=0), WEIGHTS, recipe
    ).device
    assert sum(third.values()) == 12_000_000 * 2 / 4 + 8_000_000 * (4 + 4 + 8) / 4 + 4000
    first = held_at_rest(zero(1, 4), WEIGHTS, recipe).device
    assert sum(first.values()) == 12_000_000 * 2 + 8_000_000 * (4 + 8) / 4
    whole = during_backward(zero(1, 4, reduce_bucket_size=1000), WEIGHTS)
    assert whole == {"gradients": 32_000_000, "gradient bucket": 4000}


def test_offload_moves_all_bytes_to_the_host(recipe: Config) -> None:
    config = replace(recipe, ema=replace(recipe.ema, decay=0.9))
    on_gpu = held_at_rest(zero(3, 4), WEIGHTS, config)
    for offload in ({"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}):
        moved = held_at_rest(zero(3, 4, **offload), WEIGHTS, config)
        assert sum(moved.host.values()) > 0
        assert sum(on_gpu.device.values()) == sum(moved.device.values()) + sum(moved.host.values())


def test_live_weights_are_bounded_by_the_json_and_by_the_model() -> None:
    few = {"stage3_max_live_parameters": 10**6, "stage3_max_reuse_distance": 10**6}
    assert live_weights(zero(3, 4, **few), WEIGHTS) == 2 * (10**6 + 10**6)
    assert live_weights(zero(3, 4), WEIGHTS) == 2 * 12_000_000, "DeepSpeed's bound is 1e9 elements"
    assert live_weights(zero(2, 4), WEIGHTS) == missing_weights(zero(2, 4), WEIGHTS) == 0
    assert missing_weights(zero(3, 4), WEIGHTS) == 2 * 9_000_000


def test_deepspeeds_defaults_are_used() -> None:
    settings = zero_settings({"zero_optimization": {"stage": 3}})
    assert (settings.reduce_bucket_size, settings.max_live_parameters) == (500_000_000, 1_000_000_000)


def test_a_plan_follows_its_settings(job: Job) -> None:
    plan = reckon(job)
    assert [phase.name for phase in plan.phases] == ["denoise", "decode", "replay", "update"]
    gathering = reckon(
        replace(job, config=replace(job.config, rollout=replace(job.config.rollout, parameters="gathered")))
    )
    assert [phase.name for phase in gathering.phases] == ["gather", "denoise", "decode", "replay", "update"]
    whole = sum(job.weights.trained) * job.zero.weight_bytes  # few enough to be gathered at once
    assert gathering.phases[0].parts["weights on their way"] == whole
    assert gathering.phases[0].parts["weights fetched"] == gathering.phases[1].parts["weights fetched"] == whole // 2
    assert not plan.gathers

    def part(changed: Job, phase: int, name: str) -> int:
        return reckon(changed).phases[phase].parts.get(name, 0)

    def with_rollout(**values: object) -> Job:
        return replace(job, config=replace(job.config, rollout=replace(job.config.rollout, **values)))

    assert reckon(with_rollout(parameters="gathered")).gathers
    offloaded = reckon(with_rollout(offload_trajectories=True))
    assert offloaded.host["trajectories"] == part(job, 0, "trajectories") > 0
    assert "trajectories" not in offloaded.phases[2].parts
    waiting = part(job, 0, "videos to be scored")
    assert part(with_rollout(score_ahead=0), 0, "videos to be scored") == waiting / 3
    assert waiting == 3 * 2 * 13 * 3 * 64 * 64 * 4
    resting = replace(job, config=replace(job.config, policy=replace(job.config.policy, frozen_rest_on="cpu")))
    assert part(resting, 2, "VAE and image encoder") == 0
    assert part(resting, 1, "VAE and image encoder") == part(job, 1, "VAE and image encoder") > 0


def test_trajectories_are_counted_for_the_samples_of_one_rank(job: Job) -> None:
    steps, elements = job.config.sampler.num_steps, 4 * 4 * 16 * 16
    samples = job.config.rollout.prompts_per_step * job.config.rollout.group_size / 2
    assert reckon(job).phases[2].parts["trajectories"] == samples * (steps + 1) * elements * 4
    grouped = replace(job, config=replace(job.config, parallel=replace(job.config.parallel, sequence=2)))
    assert reckon(grouped).phases[2].parts["trajectories"] == 2 * samples * (steps + 1) * elements * 4


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
    enough = advise(job, plan, plan.peak * 0.9)
    assert enough.fits
    assert enough.changes
    assert set(enough.changes) <= set(CHANGES)
    hopeless = advise(job, plan, 1)
    assert not hopeless.fits
    assert hopeless.peak < plan.peak
    assert advise(job, plan, plan.peak).changes == (), "only necessary settings are changed"


def test_changes_that_break_a_rule_are_not_advised(job: Job) -> None:
    odd = replace(job, ranks=3, config=replace(job.config, rollout=replace(job.config.rollout, prompts_per_step=3)))
    assert reckon(odd).peak
    assert possible(replace(odd, ranks=2 * 3 * 64)) is None


def test_the_usable_memory_is_less_than_that_of_the_card() -> None:
    assert room(80) == 76 * 10**9 - RUNTIME


def test_a_dry_run_counts_the_work_of_training(job: Job) -> None:
    rollout = job.config.rollout
    found = count_step(job)
    assert (found.ranks, found.groups, found.samples) == (2, 2, rollout.prompts_per_step * rollout.group_size)
    assert found.micro_batches == found.samples / 2 / rollout.micro_batch_size
    assert found.forwards == found.micro_batches * job.config.sampler.num_steps
    assert sum(found.passes) == found.micro_batches * job.config.sampler.trained_count
    assert len(found.passes) == job.config.optim.updates_per_rollout
    with pytest.raises(ConfigError, match="do not divide"):
        count_step(replace(job, ranks=5))


def test_the_command_plans_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(RECIPE), "--gpus", "2"]
    assert command.main([*arguments, "--gigabytes", "24", "80"]) == 0
    shown = capsys.readouterr().out
    assert "24 GB: fits" in shown
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
    assert command.main(["--model", "ltx-video", "--gpus", "8", "--size", "large"]) == 2
    assert "height x width x frames" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.MODEL_FLAGS)
def test_model_flags_are_refused_together_with_a_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = command.MODEL_FLAGS[name]
    values = [] if flag.options.get("action") else [{"offload": "all", "zero": "2"}.get(name, "1")]
    assert command.main(["--config", str(RECIPE), "--gpus", "2", f"--{name}", *values]) == 2
    message = capsys.readouterr().err
    assert f"error: --{name} is a flag of --model; with a recipe use {flag.recipe.partition(' ')[0]}" in message


def test_flags_suggested_by_messages_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag that a message suggests is a recipe flag, with the given value."""
    assert command.main(["--config", str(RECIPE), "--gpus", "2", "--sequence", "4"]) == 2
    assert "use --parallel.sequence 4\n" in capsys.readouterr().err
    values = {"family": "WanPipeline", "zero": "2", "guidance": "2.0"}
    plain = {name: flag for name, flag in command.MODEL_FLAGS.items() if name not in ("size", "offload")}
    for name, flag in plain.items():
        load_recipe(["--config", str(RECIPE), *flag.recipe.format(values.get(name, "8")).split()])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--gpus 0", "--gpus: 0 must be 1 or more"),
        ("--gpus -1", "--gpus: -1 must be 1 or more"),
        ("--gpus 1 --gigabytes 0", "--gigabytes: 0 must be 1 or more"),
        ("--gpus 1 --reward-gigabytes -1", "--reward-gigabytes: -1.0 must be 0 or more"),
        ("--gpus 1 --sequence 0", "--sequence: 0 must be 1 or more"),
        ("--gpus 1 --prompts 0", "--prompts: 0 must be 1 or more"),
        ("--gpus 1 --group-size 0", "--group-size: 0 must be 1 or more"),
        ("--gpus 1 --micro-batch -2", "--micro-batch: -2 must be 1 or more"),
        ("--gpus 1 --guidance 0", "--guidance: 0.0 must be above 0"),
        ("--gpus 1 --lora-rank -1", "policy.lora.rank: Input should be greater than or equal to 0 (given: -1)"),
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
        command.main(["--config", str(RECIPE.with_name("tiny_wan_sft.yaml")), "--gpus", "2"])
    assert stopped.value.code == 2
    assert "is a recipe of kind 'sft'; this command takes recipes of kind 'bpgo'" in capsys.readouterr().err


def test_the_command_fails_where_nothing_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "advise", lambda job, plan, size: Advice(("more",), 7 * 10**9, False))
    arguments = ["--config", str(RECIPE), "--gpus", "2", "--gigabytes", "2"]
    assert command.main(arguments) == 1
    assert "still does not fit" in capsys.readouterr().out


def test_model_flags_become_a_recipe() -> None:
    parsed = command.parser().parse_args(["--model", "ltx-video", "--gpus", "8", "--sequence", "2", "--zero", "2"])
    config = config_from_dict(command.recipe_of(parsed))
    assert config.policy.max_sequence_length == 128
    assert config.parallel.sequence == 2
    assert config.rollout.prompts_per_step == 1, "8 samples fill 4 groups"
    assert config.policy.family is None
    images = ["--model", "wan2.2-ti2v-5b", "--gpus", "8", "--family", "WanImageToVideoPipeline"]
    assert config_from_dict(command.recipe_of(command.parser().parse_args(images))).policy.family == images[-1]


def test_blocks_are_the_module_lists_of_a_model() -> None:
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    assert repeated_blocks(module) == list(module["blocks"])
