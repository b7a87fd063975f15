"""`bpgo-video plan` as a script of the clone.

    python tools/plan_memory.py --config pipelines/configs/wan21_1.3b_480p_8x80gb.yaml --gpus 8 --gigabytes 80

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]], script=__doc__))
