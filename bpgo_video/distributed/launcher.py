"""DeepSpeed's launcher of one machine, as `--ranks N` starts it: `python -m bpgo_video.distributed.launcher N FLAGS`.

One process detects the accelerator, for all ranks, and starts them. The command `deepspeed` would start it as a child,
and leave the ranks running when a signal ends it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Sequence

from deepspeed.accelerator import get_accelerator
from deepspeed.launcher import launch


def devices(ranks: int, visible: str | None) -> list[str]:
    """The devices of the ranks: the first ones of CUDA_VISIBLE_DEVICES, or of the machine if it is unset or empty.

    Raises:
        ValueError: it names too few.
    """
    named = visible.split(",") if visible else list(map(str, range(ranks)))
    if len(named) < ranks:
        raise ValueError(f"--ranks {ranks} needs a GPU for each rank, but CUDA_VISIBLE_DEVICES names {visible}")
    return named[:ranks]


def main(words: Sequence[str]) -> None:
    """Run the launcher with the words N FLAGS until all ranks have ended.

    Raises:
        SystemExit: they did not end well; with the first one's exit code.
    """
    ranks, *flags = words
    kind = get_accelerator().device_name()
    try:
        found = devices(int(ranks), os.environ.get("CUDA_VISIBLE_DEVICES") if kind == "cuda" else None)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    world = base64.urlsafe_b64encode(json.dumps({"localhost": found}).encode()).decode()
    os.environ["DS_ACCELERATOR"] = kind  # otherwise each rank detects it, and warns if it is the CPU
    sys.argv = [sys.argv[0], f"--world_info={world}", *flags]
    launch.main()


if __name__ == "__main__":
    main(sys.argv[1:])
