"""One VBench dimension, measured by VBench's own package under an interpreter that has it.

    python vbench_dimension.py '{"module", "benchmark", "device", "suite", "output", "videos", "dimension", "options"}'

Needs nothing of this project. The package writes the result to a file; an error is the exit code.
"""

import importlib
import json
import sys


def main(task):
    import torch

    benchmark = getattr(importlib.import_module(task["module"]), task["benchmark"])
    evaluation = benchmark(torch.device(task["device"]), task["suite"], task["output"])
    evaluation.evaluate(
        videos_path=task["videos"], name=task["dimension"], dimension_list=[task["dimension"]], **task["options"]
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
