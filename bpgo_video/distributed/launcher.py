"""DeepSpeed's launcher, as `--ranks N` starts it: the accelerator is detected once, here, for all its processes."""

from __future__ import annotations

import os
import sys

from deepspeed.accelerator import get_accelerator
from deepspeed.launcher.runner import main

if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = get_accelerator().device_name()  # the launcher would warn if this is the CPU
    sys.exit(main())
