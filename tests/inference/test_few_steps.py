"""Few-step policies: adapters fused into a folder, stated noise levels, and exports that keep both."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, WanPipeline
from safetensors.torch import load_file, save_file

from bpgo_video.commands.fuse import main
from bpgo_video.config.bpgo import Config
from bpgo_video.config.command_line import read_settings
from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.config.policy import LoraConfig
from bpgo_video.diffusion.sde import cps, steps_of
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.inference.conversion import Conversion, convert
from bpgo_video.inference.run_weights import find_checkpoint
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies.schedule import at_levels, given_sigmas
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import evaluation_denoiser, training_denoiser
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import trained_steps_of, transformers_by_step
from bpgo_video.rollouts.updates import optimise
from tests.families import CASES
from tests.families.case import CPU
from tests.inference.videos import case_settings, pipeline_of, videos
from tests.made.written_runs import write_run
from tests.rollouts.test_replay import PlainLearner, total_loss

SIGMAS = (1.0, 0.9375, 0.8, 0.5)
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
CASE = CASES["wan"]
SCALE = 0.5


def euler_at(sigmas: tuple[float, ...]) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' Euler scheduler at these levels, by its own argument, without `at_levels`."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    own = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, device=None: own(sigmas=list(sigmas), device=device)
    return scheduler


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "wan"
    CASE.write(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path) -> Path:
    """Adapters as distilled models publish them: the authors' names, alpha, and differences of biases."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for layer, (out, width) in {"self_attn.q": (32, 32), "cross_attn.v": (32, 32), "ffn.0": (32, 32)}.items():
        for block in range(2):
            name = f"diffusion_model.blocks.{block}.{layer}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=generator)
            tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
            tensors[f"{name}.diff_b"] = torch.randn(out, generator=generator)
    file = base.parent / "adapters.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    return file


@pytest.fixture(scope="module")
def fused(base: Path, adapters: Path) -> Path:
    output = base.parent / "fused"
    words = ["--policy", str(base), "--lora", str(adapters), "--output", str(output), "--scale", str(SCALE)]
    assert main(words) == 0
    return output


def few_steps(config: Config, **evaluation: Any) -> Config:
    sampler = replace(config.sampler, num_steps=len(SIGMAS), sigmas=SIGMAS, shift=None)
    return replace(config, sampler=sampler, evaluation=replace(config.evaluation, num_steps=len(SIGMAS), **evaluation))


def test_fused_weights_are_the_closed_form(base: Path, adapters: Path, fused: Path) -> None:
    """W + scale alpha/rank B A, and b + scale difference; every other tensor, and every other file, is the base's."""
    before, after, stored = load_file(base / WEIGHTS), load_file(fused / WEIGHTS), load_file(adapters)
    names = {"self_attn.q": "attn1.to_q", "cross_attn.v": "attn2.to_v", "ffn.0": "ffn.net.0.proj"}
    for block in range(2):
        for theirs, ours in names.items():
            name, layer = f"diffusion_model.blocks.{block}.{theirs}", f"blocks.{block}.{ours}"
            down, up = (stored[f"{name}.lora_{half}.weight"] for half in ("down", "up"))
            expected = before.pop(f"{layer}.weight") + SCALE * 2.0 / 4 * up @ down
            torch.testing.assert_close(after.pop(f"{layer}.weight"), expected, rtol=1e-5, atol=1e-5)
            bias = before.pop(f"{layer}.bias") + SCALE * stored[f"{name}.diff_b"]
            torch.testing.assert_close(after.pop(f"{layer}.bias"), bias, rtol=1e-5, atol=1e-5)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    files = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert {path.relative_to(fused) for path in fused.rglob("*") if path.is_file()} == files | {Path("fused.json")}
    assert all((base / file).read_bytes() == (fused / file).read_bytes() for file in files - {WEIGHTS})


def test_the_rollout_equals_the_pipeline_with_the_adapters_and_levels(base: Path, adapters: Path, fused: Path) -> None:
    """diffusers keeps the adapters apart from the weights, and takes the levels by its scheduler's argument."""
    policy = CASE.policy(fused)
    config = few_steps(CASE.recipe(fused))
    prompts = CASE.prompts(policy, config)
    start = torch.randn(2, *policy.latent_shape(CASE.video), generator=torch.Generator().manual_seed(1))
    pipeline = WanPipeline.from_pretrained(base)
    pipeline.scheduler = euler_at(SIGMAS)
    pipeline.load_lora_weights(str(adapters), adapter_name="distilled")
    pipeline.set_adapters(["distilled"], adapter_weights=[SCALE])
    pipeline.set_progress_bar_config(disable=True)
    expected = torch.cat([
        pipeline(
            text, num_frames=9, height=64, width=64, num_inference_steps=len(SIGMAS), guidance_scale=1.0,
            max_sequence_length=CASE.text_tokens, latents=start[row : row + 1], output_type="pt",
        ).frames
        for row, text in enumerate(CASE.texts)
    ])  # fmt: skip
    for denoiser in (training_denoiser(policy, config), evaluation_denoiser(policy, config)):
        assert torch.equal(denoiser.sigmas, torch.tensor([*SIGMAS, 0.0]))
        path = denoiser.denoise(start, guidance_of(prompts, torch.arange(2), CPU), lambda _: start)
        found = policy.decode(path.latents[:, -1], prompts.conditioning)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    other = CASE.policy(base)
    path = training_denoiser(other, config).denoise(start, guidance_of(prompts, torch.arange(2), CPU), lambda _: start)
    assert (other.decode(path.latents[:, -1], prompts.conditioning) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["ltx", "ltx2", "flux_schnell"])
def test_pipelines_that_compute_levels_of_their_own_take_the_stated_ones(name: str, tmp_path: Path) -> None:
    """These pass levels to the scheduler, and a shift by the size of the video."""
    case = replace(CASES[name], euler=lambda _: at_levels(FlowMatchEulerDiscreteScheduler(), SIGMAS))
    case.write(tmp_path / "pipeline")
    policy, config = case.policy(tmp_path / "pipeline"), few_steps(case.recipe(tmp_path / "pipeline"))
    prompts = case.prompts(policy, config)
    start = torch.randn(2, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(1))
    path = training_denoiser(policy, config).denoise(start, guidance_of(prompts, torch.arange(2), CPU), lambda _: start)
    found = policy.decode(path.latents[:, -1], prompts.conditioning)
    expected = case.diffusers_videos(policy, start, len(SIGMAS), guided=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "eta"), [("cps", 1.0), ("flow_sde", 0.7)])
def test_the_ratio_is_one_at_stated_levels_and_an_update_lowers_its_loss(fused: Path, name: str, eta: float) -> None:
    policy, config = CASE.policy(fused), few_steps(CASE.recipe(fused))
    loss = replace(config.loss, clip_range=(0.9, 9.0))
    config = replace(config, loss=loss, sampler=replace(config.sampler, name=name, eta=eta))
    prompts = CASE.prompts(policy, config)
    chunks = sample_chunks(
        training_denoiser(policy, config), prompts, Mesh(0, 1, CPU), group_size=2, micro_batch_size=2,
        latent_shape=policy.latent_shape(CASE.video), key=(0, "rollout", 0),
        trained_steps=trained_steps_of(policy, config, 0),
    )  # fmt: skip
    trajectories = [trajectory for chunk in chunks for trajectory in chunk.trajectories]
    assert trajectories[0].trained_steps == (0, 1, 2)
    advantage = torch.tensor([[1.0, -1.0], [0.2, -0.2]])
    advantages = GroupAdvantages(advantage, advantage.flip(1), torch.tensor([1.2, 0.8]), {})
    objective = Replay(policy, config, prompts, advantages, 0, CPU)
    before = total_loss(objective, trajectories)
    learner = PlainLearner(policy.transformers, learning_rate=1e-3)
    found = optimise(learner, objective, trajectories, updates_per_rollout=1)
    assert found.metrics["ratio_error_first_update_max"] == 0.0
    assert total_loss(objective, trajectories) < before


def test_an_export_keeps_the_adapters_and_its_card_the_levels(fused: Path, adapters: Path, tmp_path: Path) -> None:
    """The card's own code, run on the export, makes the video that `bpgo-video generate` makes of the run."""
    run = write_run(fused, tmp_path / "run", LoraConfig(rank=4, alpha=8), few_steps(CASE.recipe(fused)))
    output = tmp_path / "export"
    convert(Conversion(find_checkpoint(run), "raw", output), "diffusers", verify=True)
    assert (output / "fused.json").read_bytes() == (fused / "fused.json").read_bytes()
    card = (output / "README.md").read_text()
    assert json.loads((fused / "fused.json").read_text())["adapters"]["transformer"]["sha256"] in card
    settings = case_settings(CASE, output, tmp_path, num_steps=None, sigmas=SIGMAS, guidance_scale=1.0, batch_size=1)
    found = videos(replace(settings, policy=str(run)))
    pipeline = pipeline_of(replace(settings, sigmas=(), num_steps=len(SIGMAS)))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, {"pipeline": pipeline})
    torch.testing.assert_close(
        videos(replace(settings, sigmas=(), num_steps=len(SIGMAS)), pipeline), found, rtol=0, atol=1e-5
    )


def test_levels_decide_which_expert_computes_a_step(tmp_path: Path) -> None:
    case = CASES["wan22"]
    case.write(tmp_path / "pipeline")
    policy = case.policy(tmp_path / "pipeline", components=())
    boundary = policy.pipeline.config.boundary_ratio
    recipe = case.recipe(tmp_path / "pipeline")
    sampler = replace(recipe.sampler, num_steps=3, sigmas=(1.0, boundary, boundary - 0.01))
    assert transformers_by_step(policy, replace(recipe, sampler=sampler)) == [
        "transformer", "transformer", "transformer_2"
    ]  # fmt: skip


def test_new_noise_in_each_step_is_cps_with_eta_1() -> None:
    scheduler = at_levels(FlowMatchLCMScheduler(), SIGMAS)
    scheduler.set_timesteps(len(SIGMAS))
    latents = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(2)
    for step, timestep in zip(steps_of(given_sigmas(SIGMAS)), scheduler.timesteps, strict=True):
        velocity = torch.randn(latents.shape, generator=draws)
        theirs = torch.Generator().manual_seed(7)
        expected = scheduler.step(velocity, timestep, latents, generator=theirs, return_dict=False)[0]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
        latents = cps(velocity, latents, step, eta=1.0).sample(noise).float()
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)


def test_noise_of_the_steps_does_not_depend_on_the_batch(base: Path, tmp_path: Path) -> None:
    settings = case_settings(CASE, base, tmp_path, num_steps=None, sigmas=SIGMAS, scheduler="lcm")
    together, alone = videos(settings), videos(replace(settings, batch_size=1))
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert (together - videos(replace(settings, scheduler="euler"))).abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": (0.5, 0.9)}, "sigmas 0.5 0.9 must fall from each step to the next"),
        ({"num_steps": 4}, "state all noise levels, but num_steps is 4"),
        ({"flow_shift": 3.0}, "state all noise levels, but flow_shift is 3.0"),
        ({"scheduler": "unipc"}, "scheduler 'unipc' takes none; write --scheduler euler or lcm"),
    ],
)
def test_settings_that_contradict_the_levels_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"num_steps": None, "sigmas": SIGMAS, **changes}
    with pytest.raises(GenerationError, match=message):
        pipeline_of(case_settings(CASE, base, tmp_path, **given))


def test_levels_are_read_from_flags() -> None:
    required = ["--policy", "p", "--prompts", "q", "--output", "o", "--seed", "0"]
    found = read_settings(GenerationSettings, [*required, "--sigmas", "1.0", "0.9375", "0.5"], "generate")
    assert found.sigmas == (1.0, 0.9375, 0.5)


def test_levels_of_a_family_with_its_own_schedule_are_refused(tmp_path: Path) -> None:
    case = CASES["mochi"]
    case.write(tmp_path / "pipeline")
    settings = case_settings(case, tmp_path / "pipeline", tmp_path, num_steps=None, sigmas=SIGMAS)
    with pytest.raises(GenerationError, match="supports only its own noise levels; remove --sigmas"):
        pipeline_of(settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there are no adapters to fuse"),
        (["--lora", "missing.safetensors"], "there is no file missing.safetensors"),
        (["--lora-2", "missing.safetensors"], r"is for transformer_2, but .* has only \['transformer'\]"),
    ],
)
def test_what_cannot_be_fused_is_named(
    words: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--policy", str(base), "--output", str(tmp_path / "fused"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "fused").exists()


def test_adapters_of_another_model_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.safetensors"
    halves = {"lora_A.weight": torch.ones(4, 32), "lora_B.weight": torch.ones(32, 4)}
    save_file({f"transformer.blocks.7.attn1.to_q.{half}": value for half, value in halves.items()}, file)
    assert main(["--policy", str(base), "--lora", str(file), "--output", str(tmp_path / "fused")]) == 2
    assert "the model has no such layer; give adapters of this model" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
