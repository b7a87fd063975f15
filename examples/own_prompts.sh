#!/usr/bin/env bash
# Your own prompts: from a text file to a run. Two CPU cores, no GPU, no downloads.
#   bash own_prompts.sh [flags of `bpgo-video train`]
set -euo pipefail
policy=package:bpgo_video.tiny/weights/wan    # yours: a diffusers folder or hub id, Wan-AI/Wan2.1-T2V-1.3B-Diffusers
tokens=16                                     # as policy.max_sequence_length of the recipe; 512 for Wan

# A prompt a line. Held-out prompts are never trained on; they decide whether training helped.
cat > prompts.jsonl <<'END'
{"prompt": "a red circle moving left"}
{"prompt": "a blue square moving up"}
{"prompt": "a green triangle moving right"}
{"prompt": "a yellow circle moving down"}
{"prompt": "a red square moving right", "split": "heldout"}
{"prompt": "a blue triangle moving left", "split": "heldout"}
END

# The policy's text encoder embeds each prompt once; training never loads it.
bpgo-video prompts build --input prompts.jsonl --output runs/my-prompts --policy $policy --max-sequence-length $tokens
bpgo-video prompts stats runs/my-prompts      # equal and nearly equal prompts, and whether they leak into a split

# The anchors: what the starting policy earns on each prompt. They are stored with the prompts.
bpgo-video priors tiny_wan_bpgo --data.shards runs/my-prompts
bpgo-video train tiny_wan_bpgo --data.shards runs/my-prompts --run.dir runs/my-run --run.num-steps 10 \
    --evaluation.samples-per-prompt 4 --ranks 2 "$@"
