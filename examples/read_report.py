"""Five questions about a finished run, answered from its files. The report draws the same numbers.

python read_report.py runs/demo
"""

import json
import sys
from pathlib import Path
from statistics import fmean

run = Path(sys.argv[1])
summary = json.loads((run / "summary.json").read_text())
steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]  # one record a step
third = max(1, len(steps) // 3)  # single steps are noisy: compare the first third with the last


def early_and_late(key: str) -> str:
    parts = [[step[key] for step in part if key in step] for part in (steps[:third], steps[-third:])]
    return " -> ".join(f"{fmean(part):.3f}" if part else "not recorded" for part in parts)


# On prompts that were never trained on. The interval is over prompts: if it contains 0, nothing is shown.
print("1. Did it help?", summary["heldout_reward"])
print("  ", f"{summary['heldout_before']:.3f} -> {summary['heldout_after']:.3f}, interval", summary["heldout_interval"])

# If this rises while 1 falls, the policy exploits its reward. Watch the videos.
print("2. What was it paid for?", early_and_late("reward"))

# Not exactly 0: the replay is not the rollout, and the gradient is biased.
print("3. Was the gradient exact?", summary["max_ratio_error_first_update"])

# Near 0: all samples of a prompt earn the same, or all of them are equally bad.
print("4. Do samples of a prompt differ? std", early_and_late("reward_std"))
print("   groups whose samples all earn the same:", early_and_late("zero_std_share"))

# Near 1 with no spread: trust does nothing. Far from 1 with no spread: it only changes the length of the step.
print("5. What did trust do? mean", early_and_late("trust_mean"), "  spread", early_and_late("trust_std"))

for sentence in summary["diagnosis"]:
    print("-", sentence)
