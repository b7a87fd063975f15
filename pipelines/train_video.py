"""Post-train a video diffusion policy with BPGO.

deepspeed --num_accelerators 2 pipelines/train_video.py --config pipelines/configs/tiny_wan_bpgo.yaml
python pipelines/train_video.py --help
"""

from bpgo_video.trainer import main

if __name__ == "__main__":
    main()
