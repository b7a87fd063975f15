"""AdamW on flat fp32 weights on a CPU, as an offloaded optimizer runs it: python -m tools.bench.adamw

Processor seconds of one thread for 20M weights, relative to torch's AdamW without fused kernels. `--deepspeed` adds
DeepSpeed's CPU Adam, which is compiled at its first use: minutes, with a C++ compiler.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tools.bench.timing import in_turn

WEIGHTS, ROUNDS = 20_000_000, 9
RATE, DECAY = 1e-3, 0.01


def deepspeed_adam(weights: list[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(weights, lr=RATE, weight_decay=DECAY, adamw_mode=True)
    return optimizer


def step_of(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[], object]:
    weights = torch.nn.Parameter(torch.randn(WEIGHTS))
    weights.grad = torch.randn(WEIGHTS)
    return make([weights]).step


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.adamw", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspeed", action="store_true", help="also DeepSpeed's CPU Adam")
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "torch": lambda weights: torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY),
        "torch, fused (ours)": lambda weights: torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY, fused=True),
        **({"DeepSpeed's CPU Adam": deepspeed_adam} if args.deepspeed else {}),
    }
    times = in_turn({name: step_of(make) for name, make in makers.items()}, ROUNDS, time.process_time)
    for name, seconds in times.items():
        print(f"{name}: {seconds / times['torch']:.2f}", flush=True)


if __name__ == "__main__":
    main()
