"""Settings of a generation, as flags; `inference.pipeline` completes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bpgo_video.config.fields import STRICT, AboveZero, Held, NonNegative, Real, Sigmas, Switch, Unit
from bpgo_video.errors import InputError


class GenerationError(InputError):
    """Settings or an output folder that cannot be used; the message names the way out."""


@dataclass(frozen=True, config=STRICT)
class GenerationSettings:
    """Generate videos with a policy: prompts in, mp4 or png files and a manifest out. Existing files are kept."""

    policy: str
    """A diffusers pipeline, such as RUN/export: local folder, hub id, or `package:module/folder`. Or a training
    checkpoint, RUN/checkpoints/step-XXXXXX, or a RUN for its newest one."""
    prompts: Path
    """.txt, one prompt per line; .jsonl, {"prompt", "negative_prompt"?, "id"?, "split"?, "tags"?} per line; .csv with
    these columns; VBench's .json; or a folder of prompt shards."""
    output: Path
    """Folder for the videos. The same settings continue an interrupted generation there."""
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
    """Seed of the initial noise, which is a function of seed, prompt id and sample number."""
    family: str | None = None
    """As policy.family in recipes; None takes that of the run, or what the pipeline folder says."""
    lora: Path | None = None
    """Adapters to load, a .safetensors file in a layout that diffusers reads; for Wan 2.2, the high-noise expert's."""
    lora_2: Path | None = None
    """Adapters of Wan 2.2's low-noise expert, transformer_2."""
    weights: Literal["raw", "ema"] = "raw"
    """Weights of a training checkpoint: the optimizer's (raw), or their average (ema) if the run kept one."""
    split: str | None = None
    """Split of the prompt shards; None takes all prompts."""
    negative_prompt: str = ""
    """Negative prompt for guidance, for prompts without their own."""
    num_steps: Held | None = None
    """Denoising steps; None takes the pipeline's default (50 for Wan), as for guidance_scale."""
    guidance_scale: Real | None = None
    """Scale of classifier-free guidance; 1 switches it off. Some pipelines name it true_cfg_scale."""
    guidance_scale_2: Real | None = None
    """Scale for Wan 2.2's low-noise expert; None takes guidance_scale."""
    embedded_guidance: NonNegative | None = None
    """Guidance that a distilled transformer takes as an input: HunyuanVideo, FLUX.1 (guidance_scale in the pipeline).
    None takes the run's value, or the pipeline's. So do decode_timestep and decode_noise_scale."""
    decode_timestep: Unit | None = None
    """Noise level at which the VAE of LTX-Video 0.9.1 and later decodes."""
    decode_noise_scale: Unit | None = None
    """Scale of the noise that LTX-Video adds before it decodes."""
    num_frames: Held | None = None
    """Frames per video. None takes that of the run's recipe for a RUN or a checkpoint, and the pipeline's default for
    any other model (Wan: 81 frames of 480 x 832), as for height and width."""
    height: Held | None = None
    """Pixels."""
    width: Held | None = None
    """Pixels."""
    max_sequence_length: Held | None = None
    """Text tokens, as in training; None takes the pipeline's default, or the tokenizer's limit if that is lower."""
    scheduler: Literal["unipc", "dpm", "euler", "lcm", "ddim"] | None = None
    """Solver: unipc, dpm, euler or lcm (new noise in each step, for some distilled models) for flow models; ddim or dpm
    for CogVideoX. None takes the pipeline's, or euler with sigmas."""
    flow_shift: AboveZero | None = None
    """Shift of a flow's noise levels towards noise; None takes the pipeline's. Wan's authors: 3 at 480p, 5 at 720p."""
    sigmas: Sigmas = ()
    """Noise levels at which the denoising steps start, such as 1.0 0.9375 0.8333 0.625, for euler or lcm, in place of
    num_steps and flow_shift."""
    fps: AboveZero | None = None
    """Frames per second of the files; None takes the run's, or what the model was trained on (16 for Wan)."""
    samples_per_prompt: Held = 1
    """Videos per prompt."""
    batch_size: Held = 1
    """Videos per batch; affects time and memory only."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of transformer and text encoder. The VAE stays in fp32, unless the pipeline runs in a single dtype."""
    vae_tiling: Switch | None = None
    """Decode in overlapping tiles: slower, with a fraction of the memory; pixels differ slightly in videos larger than
    a tile. None takes the run's setting, or False. So do vae_slicing and attention_backend (diffusers' default)."""
    vae_slicing: Switch | None = None
    """Decode the videos of a batch one by one, with the memory of one."""
    attention_backend: str | None = None
    """Attention kernel by diffusers' name (native, _native_cudnn, flash, sage ...)."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep idle networks in CPU memory. model: one network at a time on the GPU, so the largest must fit (14B in bf16:
    28 GB); sequential: one layer at a time, slow, since every step moves all weights."""

    @property
    def adapters(self) -> dict[str, Path]:
        """Adapter files by the name of their transformer."""
        files = {"transformer": self.lora, "transformer_2": self.lora_2}
        return {name: file for name, file in files.items() if file is not None}
