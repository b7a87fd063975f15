"""Convert a training checkpoint to what inference tools read.

    python tools/convert_checkpoint.py --checkpoint runs/demo --output wan-bpgo --format diffusers --verify
    python tools/convert_checkpoint.py --checkpoint runs/demo/checkpoints/step-000050 --output adapters --format lora

Joins ZeRO's parts of any stage and number of ranks on one CPU, a tensor at a time, without a process group; nothing in
a checkpoint is unpickled before it has been looked at. Formats: diffusers, lora, comfyui, universal.
"""

import sys

from bpgo_video.export.conversion import main

if __name__ == "__main__":
    sys.exit(main())
