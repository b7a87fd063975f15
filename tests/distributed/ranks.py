"""A rank of tests: workers one after another in one process group, since starting takes longer than most of them.

python -m tests.distributed.ranks WORKER ARGUMENT ... [-- WORKER ARGUMENT ...]
"""

from __future__ import annotations

import sys
from importlib import import_module
from itertools import groupby

from bpgo_video.distributed import process_group


def main() -> None:
    mesh = process_group.start_ranks()
    for is_separator, words in groupby(sys.argv[1:], "--".__eq__):
        if not is_separator:
            worker, *arguments = words
            import_module(f"tests.distributed.{worker}").main(mesh, *arguments)
    process_group.stop_ranks()


if __name__ == "__main__":
    main()
