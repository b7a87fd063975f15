#!/usr/bin/env bash
# Your own prompts: from a text file to a run. Two CPU cores, no GPU, no downloads.
#   bash own_prompts.sh [flags of `bpgo-video train`]
set -euo pipefail
policy=package:bpgo_video.tiny/weights/wan    # yours: a diffusers folder or hub id, Wan-AI/Wan2.1-T2V-1.3B-Diffusers
tokens=16                                     # as policy.max_sequence_length of the recipe; 512 for Wan

# A prompt a line.
cat > prompts.txt <<'END'
a red circle moving left
a blue square moving up
a green triangle moving right
a yellow circle moving down
a red square moving right
a blue triangle moving left
a green circle moving up
a yellow square moving left
END

# The policy's text encoder embeds each prompt once; training never loads it.
# A quarter is held out: never trained on, it decides whether training helped.
bpgo-video prompts build --input prompts.txt --output runs/my-prompts --policy $policy --max-sequence-length $tokens \
    --holdout 0.25
bpgo-video prompts stats runs/my-prompts      # equal and nearly equal prompts, and whether they leak into a split

# The anchors: what the starting policy earns on each prompt. They are stored with the prompts.
bpgo-video priors tiny_wan_bpgo --data.shards runs/my-prompts
bpgo-video train tiny_wan_bpgo --data.shards runs/my-prompts --run.dir runs/my-run --run.num-steps 10 \
    --evaluation.samples-per-prompt 4 --ranks 2 "$@"
