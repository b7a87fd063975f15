"""Description of a model family for the shared tests, and diffusers' reference videos for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bpgo_video.config.bpgo import Config, PolicyConfig, VideoConfig
from bpgo_video.config.reading import read_yaml
from bpgo_video.data.clips import read_clip
from bpgo_video.data.media import as_bytes, write_video
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rollouts.conditioning import conditioned
from bpgo_video.types import PromptBatch
from tests.made.recipes import RECIPE

CPU = torch.device("cpu")
TEXTS = ("a red circle moving left", "a blue square moving up")
NEGATIVE = "a green triangle"


@dataclass(frozen=True)
class Case:
    """A family.

    Attributes:
        write: writes a pipeline of random weights into a new folder.
        video: size of the generated videos.
        text_tokens: max_sequence_length of its policy.
        family: `policy.family` of its recipe.
        guidance_scale: used when the rollout is compared with the pipeline.
        guidance_scale_2: of the second transformer; None without one.
        lora: names of the layers with adapters.
        euler: scheduler with which the pipeline solves the ODE as the rollout does; by default the pipeline's.
        arguments: further arguments of the pipeline's call.
        options: settings specific to the family.
        texts: the prompts.
        hidden_frames: frames that the VAE decodes before the video and that are dropped.
        encodes_clips: whether it can be trained on clips.
        adjusted_frames: leading latent frames that the pipeline adjusts by the following ones before decoding.
    """

    write: Callable[[Path], object]
    video: VideoConfig
    text_tokens: int
    family: str | None = None
    guidance_scale: float = 3.0
    guidance_scale_2: float | None = None
    lora: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    euler: Callable[[Any], Any] = lambda scheduler: scheduler
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, float] = field(default_factory=dict)
    texts: tuple[str, ...] = TEXTS
    hidden_frames: int = 0
    adjusted_frames: int = 0
    encodes_clips: bool = True

    def policy(self, folder: Path, **options: Any) -> Policy:
        own: dict[str, Any] = {"name": self.family, "options": self.options, **options}
        return load_policy(str(folder), max_sequence_length=self.text_tokens, **own)

    def recipe(self, folder: Path) -> Config:
        """The shipped recipe with this policy, four denoising steps (the last one untrained) and unit step weights."""
        recipe = read_yaml(RECIPE)
        own: dict[str, Any] = self.options
        policy = PolicyConfig(str(folder), self.text_tokens, family=self.family, **own)
        sampler = replace(recipe.sampler, num_steps=4, train_steps="all", share_steps="batch", shift=None)
        loss = replace(recipe.loss, step_weights="none")
        rewards = recipe.rewards
        if self.video.num_frames == 1:  # no frames to agree
            rewards = {name: replace(reward, trust="none") for name, reward in recipe.trained_rewards.items()}
        return replace(recipe, policy=policy, video=self.video, sampler=sampler, loss=loss, rewards=rewards)

    def pictures(self) -> list[Image.Image]:
        """An image for each text, of the video's size."""
        generator = np.random.default_rng(0)
        size = (self.video.height, self.video.width, 3)
        return [Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)) for _ in self.texts]

    def control_files(self) -> tuple[bytes, ...]:
        """A video of the case's size for each text, as the content of an mp4 file."""
        shape, files = (self.video.num_frames, 3, self.video.height, self.video.width), []
        with TemporaryDirectory() as folder:
            for row in range(len(self.texts)):
                frames = torch.rand(shape, generator=torch.Generator().manual_seed(20 + row))
                write_video(Path(folder) / f"{row}.mp4", frames, self.video.fps)
                files.append((Path(folder) / f"{row}.mp4").read_bytes())
        return tuple(files)

    def prompts(self, policy: Policy, config: Config, dtype: torch.dtype = torch.float32) -> PromptBatch:
        """The texts with all of the policy's conditioning."""
        images, negative = self._images(policy), policy.encode([NEGATIVE])
        texts = policy.encode_with_images(self.texts, images) if policy.texts_see_images else policy.encode(self.texts)
        prompts = PromptBatch(torch.tensor([1, 2]), self.texts, texts, negative, images=images)
        prompts = replace(prompts, videos=self.control_files() if policy.takes_videos else None)
        return conditioned(prompts, policy, config, dtype, Mesh(0, 1, CPU), group_size=4)

    def _images(self, policy: Policy) -> Tensor | None:
        if not policy.takes_images:
            return None
        return torch.stack([torch.from_numpy(np.array(one)) for one in self.pictures()]).permute(0, 3, 1, 2) / 255

    def diffusers_videos(self, policy: Policy, noise: Tensor, num_steps: int, guided: bool) -> Tensor:
        """Videos of diffusers' pipeline for the texts from `noise`, [prompts frames 3 height width] in [0, 1]."""
        settings: dict[str, Any] = {
            "num_frames": self.video.num_frames, "height": self.video.height, "width": self.video.width,
            "num_inference_steps": num_steps, "max_sequence_length": self.text_tokens,
            "guidance_scale": self.guidance_scale if guided else 1.0,
        }  # fmt: skip
        settings |= {"guidance_scale_2": self.guidance_scale_2} if guided and self.guidance_scale_2 else {}
        pipeline = getattr(diffusers, policy.pipeline_name).from_pretrained(policy.folder)
        pipeline.scheduler = self.euler(pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        videos, pictures = [], self._images(policy)
        for row, text in enumerate(self.texts):
            images = None if pictures is None else pictures[row : row + 1]
            media: dict[str, Any] = {policy.image_argument: self.pictures()[row]} if policy.takes_images else {}
            if policy.takes_videos:
                frames = read_clip(self.control_files()[row], 0.0, self.video)
                media["video"] = [Image.fromarray(frame) for frame in as_bytes(frames)]
            own = policy.call_arguments(pipeline, noise[row : row + 1], self.video, images)
            found = pipeline(
                prompt=text, negative_prompt=NEGATIVE, output_type="pt",
                **{**policy.take_settings(pipeline, settings), **self.arguments, **media, **own},
            )  # fmt: skip
            videos.append(policy.videos_of(found))
        return torch.cat(videos)
