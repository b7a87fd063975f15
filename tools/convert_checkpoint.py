"""`bpgo-video convert` as a script of the clone.

    python tools/convert_checkpoint.py --checkpoint runs/demo --output wan-bpgo --format diffusers --verify

It takes the same flags.
"""

import sys

from bpgo_video.commands.convert import main

if __name__ == "__main__":
    sys.exit(main(script=__doc__))
