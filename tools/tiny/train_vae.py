"""Training of the embedded policy's AutoencoderKLWan on the world of moving shapes, from scratch.

    python -m tools.tiny.train_vae --output bpgo_video/tiny/weights/wan/vae

Deterministic in --seed on one thread. Finally prints the reconstruction quality on held-out clips.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from tqdm import trange

from bpgo_video.rewards.tiny_rewards import oracle_scores
from bpgo_video.tiny import world as world

LATENT_CHANNELS = 8


def build_vae() -> AutoencoderKLWan:
    """Wan2.2's layout (2x2 patches first) with 0.65M parameters; compresses 8x in space and 4x in time."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def clips(split: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """`count` videos of a split's captions: (count, 3, frames, height, width) in [-1, 1], and their captions."""
    captions = world.captions(split)
    chosen = torch.randint(len(captions), (count,), generator=generator).tolist()
    scenes = world.sample_scenes([captions[i] for i in chosen], generator)
    return (world.render(scenes) * 2 - 1).transpose(1, 2), [captions[i].text for i in chosen]


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, count: int, seed: int) -> dict[str, float]:
    """Reconstruction of held-out clips: mean PSNR in dB, and the oracle score relative to the ground truth."""
    videos, texts = clips("heldout", count, torch.Generator().manual_seed(seed))
    decoded = torch.cat(
        [vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1) for chunk in videos.split(8)]
    )
    error = ((decoded - videos) / 2).square().mean(dim=(1, 2, 3, 4))
    scores = [oracle_scores((clip / 2 + 0.5).transpose(1, 2), texts).mean() for clip in (decoded, videos)]
    psnr = float((-10 * error.log10()).mean())
    return {"heldout_psnr_db": round(psnr, 2), "heldout_oracle_share": round(float(scores[0] / scores[1]), 4)}


def latent_statistics(vae: AutoencoderKLWan, generator: torch.Generator) -> tuple[list, list]:
    """Mean and standard deviation of each latent channel over training clips."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(clips("train", 16, generator)[0]).latent_dist.mode() for _ in range(16)])
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()


def save(vae: AutoencoderKLWan, output: Path, generator: torch.Generator) -> None:
    mean, std = latent_statistics(vae, generator)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(output)


def train(args: argparse.Namespace) -> AutoencoderKLWan:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps)
    progress = trange(args.steps, desc="vae", mininterval=10)
    for step in progress:
        videos, _ = clips("train", args.batch_size, generator)
        posterior = vae.encode(videos).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - videos
        loss = error.abs().mean() + 8 * error.square().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % args.save_every == 0:
            save(vae, args.output, torch.Generator().manual_seed(1))
            progress.write(f"step {step + 1}: {round_trip(vae, 32, seed=2)}")
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    vae = train(args)
    save(vae, args.output, torch.Generator().manual_seed(1))
    print(json.dumps({**round_trip(vae, 192, seed=3), "seconds": round(time.time() - started)}))


if __name__ == "__main__":
    main()
