"""Post-train a video diffusion policy: with BPGO on rewards, or by flow matching on videos, as the recipe says.

    deepspeed --num_accelerators 2 pipelines/train_video.py --config pipelines/configs/tiny_wan_bpgo.yaml
    deepspeed --num_accelerators 8 pipelines/train_video.py --config RECIPE.yaml --run.dir runs/mine --run.resume auto

Writes RUN/metrics.jsonl as it goes, RUN/report.html, samples and the trained model, RUN/export. A run that was stopped
goes on with --run.resume auto. Several nodes: docs/multi_node.md.
"""

from bpgo_video.training.command import main

if __name__ == "__main__":
    main(description=__doc__)
