"""How fast does a policy of Wan2.1-1.3B's shape denoise and replay on one GPU?

    python -m tools.bench.gpu --output runs/bench --frames 33 81

Random weights in the real configuration, bf16, activation checkpointing in replay, 480x832. Prints, and writes to
OUTPUT/gpu.json, seconds per denoising step (transition, sample, log-prob) and per replayed step (transition, log-prob,
backward), peak memory, and MFU: the model's floating-point operations, attention included and recomputation not, over
what the GPU's bf16 matrix products reach in the same run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.atomic import write_json
from bpgo_video.paths import resolve_folder
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rollouts.rollout import Denoiser
from bpgo_video.types import Guidance
from tools.bench.timing import seconds

WAN_1_3B = {
    "_class_name": "WanTransformer3DModel", "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-6,
    "ffn_dim": 8960, "freq_dim": 256, "in_channels": 16, "num_attention_heads": 12, "num_layers": 30,
    "out_channels": 16, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
    "text_dim": 4096,
}  # fmt: skip
TEXT_TOKENS = 512
ROUNDS = 5
MATRIX = 8192
VIDEO = VideoConfig(num_frames=81, height=480, width=832, fps=16)  # whose schedule is taken


@dataclass(frozen=True)
class Shape:
    """What is measured: a transformer's configuration, latents of one sample, where, and in which precision."""

    transformer: Mapping[str, Any]
    latents: tuple[int, int, int, int]
    device: torch.device
    dtype: torch.dtype


def random_policy(shape: Shape) -> Policy:
    """A Wan policy of that configuration; its other parts are the embedded policy's, and none of them is loaded."""

    def build(model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
        with torch.device(shape.device):
            return model_class.from_config(model_class.load_config(folder)).to(dtype)

    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "policy"
        shutil.copytree(
            resolve_folder("package:bpgo_video.tiny/weights/wan"),
            folder,
            ignore=shutil.ignore_patterns("*.safetensors"),
        )
        (folder / "transformer" / "config.json").write_text(json.dumps(dict(shape.transformer)), "utf-8")
        return load_policy(
            str(folder), components=("transformer",), max_sequence_length=TEXT_TOKENS, dtype=shape.dtype,
            device=shape.device, build=build,
        )  # fmt: skip


def forward_operations(policy: Policy, shape: Shape) -> int:
    """Floating-point operations of one forward, attention included, counted on shapes alone."""
    model = policy.transformers["transformer"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        type(model).from_config(model.config)(
            hidden_states=torch.empty(1, *shape.latents),
            timestep=torch.empty(1),
            encoder_hidden_states=torch.empty(1, TEXT_TOKENS, shape.transformer["text_dim"]),
        )
    return counter.get_total_flops()


def matrix_rate(shape: Shape) -> float:
    """Operations per second of one large matrix product in this precision."""
    a, b = (torch.randn(MATRIX, MATRIX, device=shape.device, dtype=shape.dtype) for _ in range(2))
    a @ b
    return 2 * MATRIX**3 / statistics.median(seconds(lambda: a @ b) for _ in range(ROUNDS))


def step_works(policy: Policy, shape: Shape) -> tuple[Callable[[], object], Callable[[], object]]:
    """One denoising step of a rollout, and the same with its gradient."""
    denoiser = Denoiser(policy, policy.sigmas(16, VIDEO), "flow_sde", 0.7, 1.0, torch.float32)
    latents = torch.randn(1, *shape.latents, device=shape.device)
    noise = torch.randn_like(latents)
    embeddings = torch.randn(1, TEXT_TOKENS, shape.transformer["text_dim"], device=shape.device, dtype=shape.dtype)
    guidance = Guidance({"prompt_embeds": embeddings}, {})

    def log_prob() -> Tensor:
        transition = denoiser.transition(latents, 3, guidance)
        return transition.log_prob(transition.sample(noise).detach())

    def replay() -> None:
        log_prob().sum().backward()

    return torch.no_grad()(log_prob), replay


def measure(shape: Shape) -> dict[str, float]:
    """Seconds, operations, MFU and peak bytes of a denoising step and of a replayed one."""
    policy = random_policy(shape)
    model = policy.transformers["transformer"]
    model.enable_gradient_checkpointing()
    operations, rate = forward_operations(policy, shape), matrix_rate(shape)
    found: dict[str, float] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_operations": operations,
        "matrix_rate": rate,
    }
    for name, work, passes in zip(("rollout", "replay"), step_works(policy, shape), (1, 3), strict=True):
        work()
        if shape.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(shape.device)
        found[f"{name}_seconds"] = statistics.median(seconds(work) for _ in range(ROUNDS))
        found[f"{name}_mfu"] = passes * operations / found[f"{name}_seconds"] / rate
        if shape.device.type == "cuda":
            found[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated(shape.device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--frames", type=int, nargs="+", default=[33, 81], help="of 480x832 pixels (33 81)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; this bench measures nothing without one")
    device = torch.device("cuda")
    found = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    for frames in args.frames:
        video = VideoConfig(num_frames=frames, height=480, width=832, fps=16)
        latents = (16, (frames - 1) // 4 + 1, video.height // 8, video.width // 8)
        found[f"480x832x{frames}"] = measure(Shape(WAN_1_3B, latents, device, torch.bfloat16))
    write_json(args.output / "gpu.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
