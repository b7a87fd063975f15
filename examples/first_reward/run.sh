#!/usr/bin/env bash
# Your first reward: train the embedded policy to draw larger objects. Two CPU cores, no GPU, no downloads.
#   bash run.sh [flags of `bpgo-video train`]
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH=$PWD:${PYTHONPATH:-}    # so that recipe.yaml can name size.py

bpgo-video demo --prepare                                 # prompts of the embedded policy, in runs/demo-prompts
bpgo-video priors recipe.yaml                    # what the starting policy earns on each prompt: the anchors
bpgo-video train recipe.yaml --ranks 2 "$@"      # open runs/size/report.html
