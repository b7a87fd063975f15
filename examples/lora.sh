#!/usr/bin/env bash
# A LoRA: plan the real one, then train, convert and use a small one. Two CPU cores, no GPU, no downloads.
#   bash lora.sh [flags of `bpgo-video train`]
set -euo pipefail

# Does Wan 2.1 1.3B fit on a card of 24 GB? This computes it, without weights and without a GPU.
bpgo-video plan wan21_1.3b_240p_1x24gb --gpus 1 --gigabytes 24 --reward-gigabytes 3

# The same commands on the embedded policy. Adapters take a higher learning rate than all weights do.
bpgo-video demo --prepare
bpgo-video train tiny_wan_bpgo --policy.lora.rank 16 --policy.lora.alpha 16 --optim.learning-rate 5e-4 \
    --run.dir runs/lora --run.num-steps 10 --evaluation.samples-per-prompt 4 --ranks 2 "$@"

# The adapters alone, as `pipeline.load_lora_weights` reads them; --verify compares them with the checkpoint's.
bpgo-video convert --checkpoint runs/lora --output my-lora --format lora --verify

echo "a green square moving right" > prompts.txt
bpgo-video generate --policy package:bpgo_video.tiny/weights/wan --lora my-lora/pytorch_lora_weights.safetensors \
    --prompts prompts.txt --output videos --seed 0 --num-frames 9 --height 64 --width 64 --fps 8 --num-steps 8
