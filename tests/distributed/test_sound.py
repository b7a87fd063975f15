"""A policy that makes sound is trained on two ranks under ZeRO-3, by rewards that look and that listen."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file

from bpgo_video.training.metrics import read_metrics
from tests.distributed.conftest import run_ranks
from tests.families import CASES
from tests.made.recipes import make_shards

pytestmark = pytest.mark.slow

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    CASES["ltx2"].write(folder / "pipeline")
    run_ranks(2, [str(make_shards(folder / "shards", folder / "pipeline")), str(folder), "run=sound:zero3"])
    return folder / "run"


def test_both_rewards_train_and_the_first_ratio_is_one(run: Path) -> None:
    records = read_metrics(run / "metrics.jsonl")
    assert len(records) == 2
    for record in records:
        assert record["ratio_error_first_update_max"] == 0.0
        assert record["reward/heard"] > 0
        assert record["reward/seen"] > 0
        assert record["reward_std"] > 0


def test_weights_of_video_and_sound_are_trained(run: Path) -> None:
    before, after = (load_file(folder / WEIGHTS) for folder in (run.parent / "pipeline", run / "export"))
    for name in ("proj_out.weight", "audio_proj_out.weight", "transformer_blocks.0.video_to_audio_attn.to_k.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_the_export_is_a_pipeline_that_makes_sound(run: Path) -> None:
    pipeline = LTX2Pipeline.from_pretrained(run / "export")
    case = CASES["ltx2"]
    policy = case.policy(run / "export")
    noise = torch.randn(1, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(0))
    made = pipeline(
        case.texts[0], height=64, width=96, num_frames=9, num_inference_steps=2, guidance_scale=1.0, output_type="pt",
        max_sequence_length=case.text_tokens, **policy.call_arguments(pipeline, noise, case.video, None),
    )  # fmt: skip
    assert made.audio.isfinite().all()
    assert made.audio.std() > 0


def test_held_out_videos_are_kept_with_their_sound(run: Path) -> None:
    files = sorted((run / "samples").rglob("*.mp4"))
    assert files
    for file in files:
        with av.open(str(file)) as container:
            assert container.streams.audio[0].rate == 24_000
