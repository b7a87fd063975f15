"""Reckon the memory of a recipe on each rank before a GPU is asked for, and what to change where it does not fit.

    python tools/plan_memory.py --config pipelines/configs/wan21_1.3b_480p_8x80gb.yaml --gpus 8 --gigabytes 80
    python tools/plan_memory.py --model wan2.1-t2v-14b --size 480x832x81 --gpus 32 --sequence 4

Reads no weights and needs no GPU; tools/doctor.py then measures a step on the GPUs themselves. Exit code 0 where the
job fits on a GPU of one of the sizes asked for, 1 where it fits on none, 2 where the recipe or a flag is wrong.
"""

import sys

from bpgo_video.planning.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
