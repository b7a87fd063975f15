"""Generate videos with a policy: a base model, a run's export, or either with LoRA adapters.

python pipelines/generate_video.py --policy runs/demo/export --prompts prompts.txt --output videos --seed 0
python pipelines/generate_video.py --help
"""

import sys

from bpgo_video.generation import main

if __name__ == "__main__":
    sys.exit(main())
