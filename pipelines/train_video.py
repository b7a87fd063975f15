"""Post-train a video diffusion policy: with BPGO on rewards, or by flow matching on videos, as the recipe says.

deepspeed --num_accelerators 2 pipelines/train_video.py --config pipelines/configs/tiny_wan_bpgo.yaml
python pipelines/train_video.py --help
"""

from bpgo_video.training.command import main

if __name__ == "__main__":
    main(description=__doc__)
