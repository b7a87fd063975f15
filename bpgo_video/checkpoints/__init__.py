"""What a run needs to go on: complete checkpoints, on any number of ranks, read without a pickle being run."""
