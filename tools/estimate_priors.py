"""`bpgo-video priors` as a script of the clone.

    deepspeed --num_accelerators 2 tools/estimate_priors.py --config pipelines/configs/tiny_wan_bpgo.yaml

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["priors", *sys.argv[1:]], script=__doc__))
