"""What rewards teach: the mathematics of BPGO, its priors and surrogates, from scores to advantages."""
