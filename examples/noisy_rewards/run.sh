#!/usr/bin/env bash
# When rewards are noisy: three methods on a judge that guesses about half of the prompts. Two CPU cores, no downloads.
#   bash run.sh [flags of `bpgo-video train`]
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH=$PWD:${PYTHONPATH:-}    # so that the recipes can name judge.py

bpgo-video demo --prepare                 # prompts of the embedded policy, in runs/demo-prompts
bpgo-video priors bpgo.yaml      # the anchors, by this judge

for method in grpo bpgo reliability; do
    bpgo-video train $method.yaml --ranks 2 "$@"
done

# The same held-out prompts and noise for all, scored by the oracle. GRPO is the reference.
bpgo-video evaluate compare runs/grpo runs/bpgo runs/reliability --samples-per-prompt 4 --output runs/compared
