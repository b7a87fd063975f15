"""Generate videos with a policy: a base model, an export, a checkpoint or a run, with or without LoRA adapters.

python pipelines/generate_video.py --policy runs/demo/export --prompts prompts.txt --output videos --seed 0
deepspeed pipelines/generate_video.py --policy runs/demo --prompts runs/demo-prompts --output videos --seed 0
"""

import sys

from bpgo_video.generation.generate import main

if __name__ == "__main__":
    sys.exit(main())
