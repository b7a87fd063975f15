"""`bpgo-video prompts` as a script of the clone.

    python tools/make_prompt_shards.py build --input prompts.txt --output shards --policy FOLDER
    torchrun --nproc-per-node 8 tools/make_prompt_shards.py build ... --device cuda

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prompts", *sys.argv[1:]], script=__doc__))
