"""`bpgo-video generate` as a script of the clone.

    python pipelines/generate_video.py --policy runs/demo/export --prompts prompts.txt --output videos --seed 0
    deepspeed pipelines/generate_video.py --policy runs/demo --prompts runs/demo-prompts --output videos --seed 0

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]], script=__doc__))
