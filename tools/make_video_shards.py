"""`bpgo-video videos` as a script of the clone.

    python tools/make_video_shards.py build --input FOLDER --output shards --policy FOLDER --num-frames 81 ...
    torchrun --nproc-per-node 8 tools/make_video_shards.py build ... --device cuda --dtype bfloat16

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["videos", *sys.argv[1:]], script=__doc__))
