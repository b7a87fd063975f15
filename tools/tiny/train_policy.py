"""Train the embedded policy: a complete diffusers WanPipeline on the world of moving shapes, from scratch.

    python -m tools.tiny.train_policy --vae bpgo_video/tiny/weights/wan/vae --output bpgo_video/tiny/weights/wan

Rectified flow on cached latents, text encoder and transformer jointly, on the captions of the training split alone. It
is stopped while it still makes mistakes (held-out oracle between .45 and .60), so that post-training has room.
Deterministic in --seed on one thread. Prints held-out scores at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from tqdm import trange
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from bpgo_video import sde
from bpgo_video.config import VideoConfig
from bpgo_video.policies.base import guided_velocity
from bpgo_video.policies.wan import WanPolicy
from bpgo_video.tiny import world
from bpgo_video.tiny.oracle import oracle_parts, oracle_scores

TEXT_TOKENS, TEXT_DIM = 16, 64
FLOW_SHIFT = 3.0
VIDEO = VideoConfig(world.FRAMES, world.SIZE, world.SIZE, world.FPS)
EMPTY_PROMPT_SHARE = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world; anything else is <unk>. Ends with </s>, as T5's does."""
    words = sorted({word for caption in world.all_captions() for word in caption.text.split()})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )


def build_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """Wan2.1's parts at about one million parameters; eight heads, so that ranks can share them."""
    tokenizer = build_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=8,
        attention_head_dim=16,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    return WanPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer, scheduler=scheduler)


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, count: int, generator: torch.Generator) -> tuple[Tensor, world.Scenes]:
    """Normalised latents of `count` clips of the training split's clear captions, and their scenes."""
    clear = [caption for caption in world.captions("train") if caption.is_clear]
    scenes = world.sample_scenes([clear[i % len(clear)] for i in range(count)], generator)
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(getattr(vae.config, name)).view(shape) for name in ("latents_mean", "latents_std"))
    videos = world.render(scenes).transpose(1, 2) * 2 - 1
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in videos.split(16)])
    return (latents - mean) / std, scenes


def caption_choices(scenes: world.Scenes) -> list[list[str]]:
    """Every caption of the training split that a scene fulfils: the clear one and what leaves something open."""
    known = {caption: caption.text for caption in world.captions("train")}
    choices = []
    for index in range(len(scenes.shapes)):
        full = scenes.caption(index)
        options = [
            world.Caption(shape, colour, direction)
            for shape in (full.shape, None)
            for colour in (full.colour, None)
            for direction in (full.direction, None)
        ]
        choices.append([known[option] for option in options if option in known])
    return choices


def encode_texts(pipeline: Any, texts: Sequence[str]) -> Tensor:
    """What WanPipeline.encode_prompt computes, with gradients: [texts, TEXT_TOKENS, TEXT_DIM], zero after the text."""
    tokens = pipeline.tokenizer(
        list(texts), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    embeddings = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return embeddings * tokens.attention_mask[..., None]


def flow_loss(
    pipeline: Any, data: Tensor, texts: Sequence[str], generator: torch.Generator, image_latents: Tensor | None = None
) -> Tensor:
    """E |v(x_sigma, sigma) - (noise - data)|^2 with sigma as the shifted schedule visits it.

    Args:
        image_latents: further channels of an image-to-video transformer.
    """
    noise = torch.randn(data.shape, generator=generator)
    sigma = sde.flow_shift(torch.rand(len(data), generator=generator), FLOW_SHIFT)
    level = sigma.view(-1, 1, 1, 1, 1)
    noised = (1 - level) * data + level * noise
    velocity = pipeline.transformer(
        hidden_states=noised if image_latents is None else torch.cat([noised, image_latents], dim=1),
        timestep=sigma * 1000,
        encoder_hidden_states=encode_texts(pipeline, texts),
        return_dict=False,
    )[0]
    return (velocity - (noise - data)).square().mean()


@torch.no_grad()
def sample_heldout(
    policy: WanPolicy, samples: int, guidance_scale: float, num_steps: int = 8
) -> tuple[Tensor, list[str]]:
    """Videos of every held-out caption by Euler's method; the same noise at every call."""
    texts = [caption.text for caption in world.captions("heldout") for _ in range(samples)]
    generator = torch.Generator().manual_seed(11)
    sigmas = policy.sigmas(num_steps, VIDEO)
    negative = policy.encode([""])
    videos = []
    for start in range(0, len(texts), 32):
        chunk = texts[start : start + 32]
        latents = torch.randn(len(chunk), policy.transformer_config["in_channels"], 3, 8, 8, generator=generator)
        conditioning = policy.encode(chunk)
        for index, step in enumerate(sde.steps_of(sigmas)):
            velocity = guided_velocity(policy, latents, sigmas[index], conditioning, negative, guidance_scale)
            latents = sde.ode(velocity, latents, step).mean
        videos.append(policy.decode(latents, conditioning))
    return torch.cat(videos), texts


def heldout_score(folder: Path, samples: int, guidance_scale: float) -> dict[str, float]:
    """Mean oracle score of the saved pipeline, and of its parts."""
    pipeline = WanPipeline.from_pretrained(folder)
    policy = WanPolicy(folder, pipeline, TEXT_TOKENS)
    videos, texts = sample_heldout(policy, samples, guidance_scale)
    parts = {name: round(float(score.mean()), 4) for name, score in oracle_parts(videos, texts).items()}
    return {"oracle": round(float(oracle_scores(videos, texts).mean()), 4), **parts}


def train(pipeline: WanPipeline, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    latents, scenes = encode_clips(pipeline.vae, args.clips, generator)
    choices = caption_choices(scenes)
    parameters = [*pipeline.transformer.parameters(), *pipeline.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.schedule_steps, pct_start=0.05)
    progress = trange(args.steps, desc="policy", mininterval=10)
    for step in progress:
        rows = torch.randint(len(latents), (args.batch_size,), generator=generator).tolist()
        draws = torch.rand(args.batch_size, 2, generator=generator).tolist()
        texts = [
            "" if drop < EMPTY_PROMPT_SHARE else choices[row][int(pick * len(choices[row]))]
            for row, (drop, pick) in zip(rows, draws, strict=True)
        ]
        loss = flow_loss(pipeline, latents[rows], texts, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % args.save_every == 0:
            pipeline.save_pretrained(args.output)
            progress.write(f"step {step + 1}: {heldout_score(args.output, 8, guidance_scale=1.0)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--schedule-steps", type=int, default=6000, help="where the learning rate would reach 0")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.time()
    pipeline = build_pipeline(AutoencoderKLWan.from_pretrained(args.vae))
    train(pipeline, args)
    pipeline.save_pretrained(args.output)
    scores = {f"guidance {scale}": heldout_score(args.output, 16, scale) for scale in (1.0, 2.0)}
    print(json.dumps({"heldout": scores, "seconds": round(time.time() - started)}, indent=1))


if __name__ == "__main__":
    main()
