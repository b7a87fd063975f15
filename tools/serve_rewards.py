"""`bpgo-video reward-server` as a script of the clone.

    python tools/serve_rewards.py --config RECIPE --reward NAME --port 8011

It takes the same flags.
"""

import sys

from bpgo_video.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["reward-server", *sys.argv[1:]], script=__doc__))
