"""Training on real ranks: gradients, exact ratios, exact resume and export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file

from bpgo_video.config.reading import read_yaml
from bpgo_video.data.media import read_video
from bpgo_video.data.reader import PromptShards
from bpgo_video.distributed.ema import AverageParameters
from bpgo_video.distributed.zero_files import ZeroParameters
from bpgo_video.files import resolve_folder
from bpgo_video.randomness import keyed_noise
from bpgo_video.rewards.look import WATCHED
from bpgo_video.training.metrics import read_metrics
from tests.distributed.conftest import SMOKE, STAGES
from tests.distributed.sameness import assert_same_run, records

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def exported(run_dir: Path, folder: str = "export") -> dict[str, torch.Tensor]:
    return load_file(run_dir / folder / WEIGHTS)


def starting_weights() -> dict[str, torch.Tensor]:
    return load_file(resolve_folder("package:bpgo_video.tiny/weights/wan") / WEIGHTS)


def summary_of(folder: Path, name: str, steps: int = 1) -> dict[str, Any]:
    return json.loads((folder / f"{name}.{steps}.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_the_same_on_any_world_and_stage(worlds: dict[int, Path], stage: str, world_size: int) -> None:
    start, reference = starting_weights(), exported(worlds[1] / "gradient-zero1")
    found = exported(worlds[world_size] / f"gradient-{stage}")
    for name, weight in start.items():
        gradient, expected = found[name] - weight, reference[name] - weight
        assert expected.norm() > 1e-3, f"{name} has no gradient that could be compared"
        assert (gradient - expected).norm() / expected.norm() < 1e-5, name


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_gradient_is_the_same_with_sequence_groups(worlds: dict[int, Path], world_size: int) -> None:
    """Run by the whole trainer, so noise, rewards and advantages also equal those of a single process."""
    start, reference = starting_weights(), exported(worlds[1] / "gradient-zero1")
    found = exported(worlds[world_size] / "gradient-zero3-sequence2")
    errors = {key: (found[key] - reference[key]).norm() / (reference[key] - start[key]).norm() for key in start}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)


RATIO_CASES = [
    *((2, f"ratio-{stage}-{adapters}") for stage in STAGES for adapters in ("full", "lora")),
    *((2, f"ratio-zero3-{adapters}-sequence2") for adapters in ("full", "lora")),
    *((2, f"ratio-zero3-{adapters}-gathered") for adapters in ("full", "lora")),
    (4, "ratio-zero3-full-sequence4"),
]


@pytest.mark.parametrize(("world_size", "name"), RATIO_CASES)
def test_the_ratio_is_one_before_the_first_update_and_not_after(
    worlds: dict[int, Path], world_size: int, name: str
) -> None:
    summary = summary_of(worlds[world_size], name)
    assert summary["max_ratio_error_first_update"] == 0.0
    assert f"zero{summary['zero_stage']}" in name
    record = read_metrics(worlds[world_size] / name / "metrics.jsonl")[0]
    assert record["log_ratio_abs_max"] > 1e-6, "the policy must have changed before the second update"


def test_gathered_rollouts_and_updates_equal_sharded_ones(worlds: dict[int, Path]) -> None:
    for adapters in ("full", "lora"):
        run = worlds[2] / f"ratio-zero3-{adapters}"
        assert records(run) == records(run.with_name(f"{run.name}-gathered"))


@pytest.mark.parametrize("name", ["zero2-full", "zero3-full", "zero3-lora"])
def test_a_penalty_towards_the_starting_policy_changes_the_second_update(worlds: dict[int, Path], name: str) -> None:
    free, held = (read_metrics(worlds[2] / f"held-{name}-{weight}" / "metrics.jsonl")[0] for weight in ("0", "1000"))
    assert held["kl"] > 0, "the policy differs from its start in the second update"
    assert "kl" not in free
    assert held["grad_norm"] != free["grad_norm"], "the penalty has a gradient"
    assert held["ratio_error_first_update_max"] == 0.0


@pytest.mark.parametrize("name", ["zero2-full-ema", "zero3-full-ema", "zero3-lora-ema", "zero3-full-previous"])
def test_a_penalty_towards_the_average_or_previous_policy_changes_the_second_update(
    worlds: dict[int, Path], name: str
) -> None:
    free, start, pulled = (
        read_metrics(worlds[2] / f"held-{one}" / "metrics.jsonl")[0]
        for one in (f"{name.rsplit('-', 1)[0]}-0", f"{name.rsplit('-', 1)[0]}-1000", name)
    )
    assert 0 < pulled["kl"] <= 1.001 * start["kl"], "the average is at most as far away as the start"
    assert pulled["grad_norm"] != free["grad_norm"]
    assert pulled["ratio_error_first_update_max"] == 0.0


@pytest.mark.parametrize("name", ["credited-4", "credited-2"])
def test_best_and_worst_by_frames_have_the_same_gradient_on_any_world(worlds: dict[int, Path], name: str) -> None:
    start, reference = starting_weights(), exported(worlds[1] / "credited-4")
    found = exported(worlds[2] / name)
    errors = {key: (found[key] - reference[key]).norm() / (reference[key] - start[key]).norm() for key in start}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)


def test_pairs_of_groups_on_two_ranks_have_the_same_gradient_on_any_world(worlds: dict[int, Path]) -> None:
    """Three pairs on two ranks, of which one has a sample against itself."""
    start, reference, found = starting_weights(), *(exported(worlds[ranks] / "preferred") for ranks in (1, 2))
    errors = {key: (found[key] - reference[key]).norm() / (reference[key] - start[key]).norm() for key in start}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)
    assert read_metrics(worlds[2] / "preferred" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_desirable_and_undesirable_samples_have_the_same_gradient_on_any_world(worlds: dict[int, Path]) -> None:
    start, reference, found = starting_weights(), *(exported(worlds[ranks] / "desirable") for ranks in (1, 2))
    errors = {key: (found[key] - reference[key]).norm() / (reference[key] - start[key]).norm() for key in start}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)
    assert read_metrics(worlds[2] / "desirable" / "metrics.jsonl")[0]["preference/utility"] == 0.5


@pytest.mark.parametrize("lora", ["full", "lora"])
def test_the_old_policy_is_a_slow_average_and_its_ratio_is_one_at_the_start(worlds: dict[int, Path], lora: str) -> None:
    """It keeps .2, .4 and .5 = min(.2 i, .5) of itself, of the weights after each step."""
    run = worlds[2] / f"slow-{lora}"
    steps = [run / "checkpoints" / f"step-{step:06d}" for step in (1, 2, 3)]
    weights = [ZeroParameters(folder) for folder in steps]
    old = [AverageParameters(folder, "old") for folder in steps]
    for name in old[0]:
        for i, keep in ((1, 0.4), (2, 0.5)):
            expected = keep * old[i - 1][name] + (1 - keep) * weights[i][name]
            torch.testing.assert_close(old[i][name], expected, rtol=1e-6, atol=1e-8)
    for name, start in starting_weights().items() if lora == "full" else ():
        expected = 0.2 * start + 0.8 * weights[0][f"transformer.{name}"]
        torch.testing.assert_close(old[0][f"transformer.{name}"], expected, rtol=1e-6, atol=1e-8)
    shifts = [record["ratio_to_average_max"] for record in read_metrics(run / "metrics.jsonl")]
    assert shifts[0] == 0.0, "both are the starting policy, bit for bit"
    assert all(shift > 1e-6 for shift in shifts[1:])
    assert summary_of(worlds[2], f"slow-{lora}", 3)["max_ratio_error_first_update"] is None


@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_of_rewards_is_the_same_on_any_world(worlds: dict[int, Path], steps: int) -> None:
    start, *found = starting_weights(), *(exported(worlds[ranks] / f"drafted-{steps}") for ranks in (1, 2))
    errors = {key: (found[1][key] - found[0][key]).norm() / (found[0][key] - start[key]).norm() for key in start}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("parameters", ["sharded", "gathered"])
def test_uneven_work_does_not_hang(worlds: dict[int, Path], parameters: str) -> None:
    assert summary_of(worlds[2], f"uneven-{parameters}")["heldout_videos"] == 3


def test_scoring_during_the_rollout_changes_nothing(worlds: dict[int, Path]) -> None:
    """Offloading models and trajectories to the CPU changes nothing either."""
    inline, concurrent = (worlds[2] / f"ahead-{chunks}" for chunks in (0, 2))
    one, other = records(inline), records(concurrent)
    assert len(one) == 2
    assert one == other
    weights = exported(concurrent)
    assert all(torch.equal(weights[name], weight) for name, weight in exported(inline).items())
    assert all(record["seconds/reward_work"] > 0 for record in read_metrics(concurrent / "metrics.jsonl"))


def test_stopping_and_resuming_changes_nothing(worlds: dict[int, Path]) -> None:
    whole, stopped = (
        [
            {key: value for key, value in record.items() if not key.startswith(("seconds", "checkpoint"))}
            for record in read_metrics(worlds[2] / name / "metrics.jsonl")
        ]
        for name in ("whole", "stopped")
    )
    assert len(whole) == 4
    assert [set(record) - {"step"} for record in whole[2:]] == [set(record) - {"step"} for record in stopped[2:]]
    for expected, found in zip(whole, stopped, strict=True):
        shared = {key for key in expected if not key.startswith("heldout")}
        assert {key: expected[key] for key in shared} == {key: found[key] for key in shared}
    assert whole[3] == stopped[3]
    first, second = exported(worlds[2] / "whole"), exported(worlds[2] / "stopped")
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = starting_weights()
    assert any(not torch.equal(first[name], start[name]) for name in first), "the run must have trained something"


def test_running_priors_and_averages_resume_bit_for_bit(worlds: dict[int, Path]) -> None:
    whole, stopped = (worlds[2] / name for name in ("ema-whole", "ema-stopped"))
    assert_same_run(whole, stopped)
    parts = sorted((whole / "checkpoints" / "step-000004").glob("*model_states.pt"))
    states = [torch.load(path, weights_only=False)["progress"] for path in parts]
    assert all(state["running_rewards"] == states[0]["running_rewards"] for state in states), "on every rank"
    assert all(len(running["prompts"]) == 4 for running in states[0]["running_rewards"].values())
    assert read_metrics(whole / "metrics.jsonl")[3]["trust_std"] > 0, "the anchors must affect the result"
    average, start = exported(whole, "export-ema"), starting_weights()
    assert all(torch.equal(average[name], tensor) for name, tensor in exported(stopped, "export-ema").items())
    for other in (start, exported(whole)):
        assert any(not torch.equal(average[name], other[name]) for name in start), (
            "the average is between start and end"
        )


def test_the_export_generates_the_videos_of_the_trained_policy(worlds: dict[int, Path], shards: Path) -> None:
    run_dir = worlds[2] / "whole"
    config = read_yaml(run_dir / "config.yaml")
    pipeline = WanPipeline.from_pretrained(run_dir / "export")
    shift = pipeline.scheduler.config.flow_shift
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline.set_progress_bar_config(disable=True)
    prompt = next(PromptShards(shards).records("heldout"))
    noise = keyed_noise((8, 3, 8, 8), [(config.run.seed, "heldout", prompt.id, 0, "start")], "cpu")
    frames = pipeline(
        prompt.prompt,
        negative_prompt="",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=config.evaluation.num_steps,
        guidance_scale=config.evaluation.guidance_scale,
        max_sequence_length=config.policy.max_sequence_length,
        latents=noise,
        output_type="pt",
    ).frames[0]
    from_training, _ = read_video(run_dir / "samples" / "after" / "000.mp4")
    before_training, _ = read_video(run_dir / "samples" / "before" / "000.mp4")
    lost, moved = ((frames - video).abs().mean() for video in (from_training, before_training))
    assert lost < 0.02, "the difference is at most the loss of H.264"
    assert lost < moved, "the video is that of the trained policy, not of the starting one"


@pytest.mark.parametrize("name", SMOKE)
def test_training_works_with_other_deepspeed_configurations(worlds: dict[int, Path], name: str) -> None:
    summary = summary_of(worlds[2], f"smoke-{name}", steps=2)
    assert summary["steps"] == 2
    start, trained = starting_weights(), exported(worlds[2] / f"smoke-{name}")
    assert any(not torch.equal(trained[key].float(), start[key]) for key in start)


def test_evaluation_does_not_affect_training(worlds: dict[int, Path]) -> None:
    """Both rewards draw from torch's global generator; weights and their average are evaluated after every step."""
    alone, watched = (worlds[2] / f"evaluated-{every}" for every in ("never", "1"))
    found = records(watched)
    names = [key for key in found[0] if key.startswith(("heldout", "alarm", "look"))]
    assert sorted(names) == [
        "alarm/heldout",
        "heldout/heldout",
        "heldout/heldout_stderr",
        "heldout_ema/heldout",
        "heldout_ema/heldout_stderr",
        *sorted(WATCHED),
    ]
    assert found[1]["heldout/heldout"] != found[1]["heldout_ema/heldout"]
    assert [{key: value for key, value in record.items() if key not in names} for record in found] == records(alone)
    for folder in ("export", "export-ema"):
        expected, weights = exported(alone, folder), exported(watched, folder)
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    videos = {path.parent.name for path in (watched / "samples").rglob("*.mp4")}
    assert videos == {"before", "step-000001", "step-000001-ema", "after", "after-ema"}


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_holds_the_whole_model(memory: Path, rank: int) -> None:
    found = json.loads((memory / f"memory.rank{rank}.json").read_text())
    assert found["whole"] > 150, "large enough to distinguish from other memory"
    assert found["peak"] < 0.75 * found["whole"], "half of the model, and one gathered module at a time"
    assert found["largest_parameter_in_memory"] == 0, "every parameter is sharded"
