"""`bpgo-video train` for launchers: `deepspeed --hostfile HOSTS --module bpgo_video.train --config RECIPE`."""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
