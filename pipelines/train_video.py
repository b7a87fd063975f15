"""`bpgo-video train` as a script of the clone.

    deepspeed --num_accelerators 2 pipelines/train_video.py --config pipelines/configs/tiny_wan_bpgo.yaml
    deepspeed --num_accelerators 8 pipelines/train_video.py --config RECIPE.yaml --run.dir runs/mine --run.resume auto

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], script=__doc__))
