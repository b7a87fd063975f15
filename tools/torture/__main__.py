"""Every bad day of a run, in half an hour: kills, changed bytes, malformed input, and attacks on a reward server.

    python -m tools.torture --seed 0

Prints one table: how often each was tried, and whether it held or was detected. The exit code is 1 if anything was
silent, ended with a traceback or an unclear message, or took too long. A part runs alone as `python -m
tools.torture.kills`, and so on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from tools.torture import bytes as changed_bytes
from tools.torture import inputs, kills, requests
from tools.torture.tally import Part, Tallies, show

PARTS: dict[str, tuple[Part, int]] = {  # name -> part and number of faults
    "inputs": (inputs.run, 300),
    "bytes": (changed_bytes.run, 200),
    "requests": (requests.run, 2000),
    "kills": (kills.run, 50),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found: dict[str, Tallies] = {}
    began = time.monotonic()
    for name, (part, count) in PARTS.items():
        print(f"{name}: {count} faults, seed {args.seed}", flush=True)
        found[name] = part(args.seed, count)
    code = show({name: tally for tallies in found.values() for name, tally in tallies.items()})
    print(f"{(time.monotonic() - began) / 60:.0f} minutes, seed {args.seed}")
    return code


if __name__ == "__main__":
    sys.exit(main())
