"""Examine a recipe before a long run: the bring-up ladder, on the recipe's own ranks, in minutes.

    deepspeed --num_accelerators 2 tools/doctor.py --config pipelines/configs/tiny_wan_bpgo.yaml

Checks, in this order: the velocity is that of the folder's transformer in fp32; the ODE rollout is diffusers' own loop;
rewards tell samples of a prompt apart; replay gives a ratio of 1; the gradient flows; time and memory of a step. Takes
every flag of training, reads the same inputs, saves nothing. Exit code 0 where all holds, 1 where a rung breaks, 2
where the inputs are wrong.
"""

from bpgo_video.training.doctor_command import main

if __name__ == "__main__":
    main(description=__doc__)
