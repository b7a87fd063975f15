"""`bpgo-video doctor` as a script of the clone.

    deepspeed --num_accelerators 2 tools/doctor.py --config pipelines/configs/tiny_wan_bpgo.yaml

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]], script=__doc__))
