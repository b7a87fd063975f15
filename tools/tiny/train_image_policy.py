"""Training of an image-to-video policy from the embedded one, and prompts with images for it.

    python -m tools.tiny.train_image_policy --output runs/tiny-i2v

The embedded transformer gets input channels for the mask and the image's latents, with zero weights, so that it starts
as the text-to-video policy; a warm start (docs/training.md) trains it to continue the first frame of clips. Writes
OUTPUT/wan, a diffusers WanImageToVideoPipeline, and OUTPUT/prompts.jsonl: the embedded prompts, each with an image, the
first frame of a scene that matches it. Deterministic in --seed on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor

from bpgo_video.diffusion import sde
from bpgo_video.files import resolve_folder
from bpgo_video.policies import load_policy
from bpgo_video.rewards.tiny_rewards import oracle_scores
from bpgo_video.tiny import world as world
from tools.tiny.prompts import PATH as PROMPTS
from tools.tiny.warm_start import TEXT_TOKENS, VIDEO, add_arguments, train_warm_start

BASE = "package:bpgo_video.tiny/weights/wan"
INPUT = "patch_embedding.weight"


def widened(transformer: WanTransformer3DModel, more: int) -> WanTransformer3DModel:
    """The same transformer with `more` input channels of zero weight."""
    channels = transformer.config.in_channels
    wide = WanTransformer3DModel.from_config({**transformer.config, "in_channels": channels + more})
    weights = transformer.state_dict()
    weights[INPUT] = torch.cat([weights[INPUT], torch.zeros_like(wide.state_dict()[INPUT][:, channels:])], dim=1)
    wide.load_state_dict(weights)
    return wide


def image_pipeline(base: Path) -> WanImageToVideoPipeline:
    parts = WanPipeline.from_pretrained(base)
    stride, channels = parts.vae.config.scale_factor_temporal, parts.vae.config.z_dim
    return WanImageToVideoPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        scheduler=parts.scheduler,
        transformer=widened(parts.transformer, stride + channels),
    )


def first_frames(captions: list[world.Caption], seed: int) -> Tensor:
    """The first frame of a scene for each caption: [captions, 3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    return world.render(world.sample_scenes(captions, generator))[:, 0]


def write_prompts(output: Path, seed: int) -> None:
    """Write the embedded prompts, each with an image."""
    lines = [json.loads(line) for line in PROMPTS.read_text("utf-8").splitlines()]
    frames = first_frames([world.Caption.parse(line["prompt"]) for line in lines], seed)
    (output / "images").mkdir(parents=True, exist_ok=True)
    for number, (line, frame) in enumerate(zip(lines, frames, strict=True)):
        line["image"] = f"images/{number:03d}.png"
        pixels = (frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(output / line["image"])
    (output / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


@torch.no_grad()
def heldout_score(folder: Path, seed: int, num_steps: int = 8) -> dict[str, float]:
    """Oracle score of videos from held-out captions and images, and the distance of frame 0 from the image."""
    policy = load_policy(str(folder), max_sequence_length=TEXT_TOKENS)
    captions = world.captions("heldout")
    images = first_frames(captions, seed)
    conditioning = policy.encode([caption.text for caption in captions]) | policy.image_conditioning(images, VIDEO)
    sigmas = policy.sigmas(num_steps, VIDEO)
    latents = torch.randn(len(captions), *policy.latent_shape(VIDEO), generator=torch.Generator().manual_seed(11))
    for index, step in enumerate(sde.steps_of(sigmas)):
        latents = sde.ode(policy.velocity(latents, sigmas[index], conditioning), latents, step).mean
    videos = policy.decode(latents, conditioning)
    return {
        "oracle": round(float(oracle_scores(videos, [caption.text for caption in captions]).mean()), 4),
        "first frame off by": round(float((videos[:, 0] - images).abs().mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder for wan/, images/ and prompts.jsonl")
    parser.add_argument("--base", default=BASE, help="text-to-video pipeline (%(default)s)")
    add_arguments(parser, steps=600, clips=1024, learning_rate=5e-4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.time()
    start = args.output / "wan-training" / "start"
    image_pipeline(resolve_folder(args.base)).save_pretrained(start)
    train_warm_start(start, args.output / "wan", args)
    write_prompts(args.output, args.seed)
    scores = heldout_score(args.output / "wan", args.seed)
    print(json.dumps({"heldout": scores, "seconds": round(time.time() - started)}))


if __name__ == "__main__":
    main()
