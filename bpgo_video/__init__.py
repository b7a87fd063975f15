"""Post-training of video diffusion policies with BPGO under DeepSpeed ZeRO-3."""

import logging
import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # diffusers imports onnxruntime, which reports to its vendor
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # until `--verbose`
