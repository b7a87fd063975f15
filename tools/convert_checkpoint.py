"""`bpgo-video convert` as a script of the clone.

    python tools/convert_checkpoint.py --checkpoint runs/demo --output wan-bpgo --format diffusers --verify

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]], script=__doc__))
