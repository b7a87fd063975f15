"""`bpgo-video doctor` as a script of the clone.

    deepspeed --num_accelerators 2 tools/doctor.py --config pipelines/configs/tiny_wan_bpgo.yaml

It takes the same flags.
"""

import sys

from bpgo_video.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main(script=__doc__))
