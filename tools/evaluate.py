"""`bpgo-video evaluate` as a script of the clone.

    python tools/evaluate.py heldout --config RECIPE.yaml --policy runs/demo/export --output scores.json
    deepspeed --num_accelerators 8 tools/evaluate.py layout --policy runs/demo --suite vbench --output videos --seed 0

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]], script=__doc__))
