"""`bpgo-video train` for launchers: `deepspeed --hostfile HOSTS --module bpgo_video.train --config RECIPE`."""

import sys

from bpgo_video.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
