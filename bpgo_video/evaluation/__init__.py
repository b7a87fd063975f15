"""Which policy is better? VBench in `vbench`, models against each other in `comparing`, and held-out prompts."""
