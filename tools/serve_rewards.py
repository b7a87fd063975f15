"""`bpgo-video reward-server` as a script of the clone, with the same flags.

python tools/serve_rewards.py --config RECIPE --reward NAME --port 8011
"""

import sys

from bpgo_video.commands.reward_server import main

if __name__ == "__main__":
    sys.exit(main(script=__doc__))
