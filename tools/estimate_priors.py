"""Measure the prior anchor of every prompt: what the starting policy earns on it. Stored with the prompts.

    python tools/estimate_priors.py --config pipelines/configs/tiny_wan_bpgo.yaml
    deepspeed --num_accelerators 8 tools/estimate_priors.py --config RECIPE.yaml

Takes `prior.samples` videos per prompt of `data.split` with the recipe's own sampler, scores them with the recipe's
rewards, and writes SHARDS/priors/<reward>.json: mean, standard deviation and count per prompt, the scale s_ref (pooled
within-group standard deviation), the reward's version and the policy's hash. A recipe with another reward version or
starting policy needs them measured again. An estimation that was broken off goes on where it stopped.
"""

from bpgo_video.training.prior_estimation import main

if __name__ == "__main__":
    main(description=__doc__)
