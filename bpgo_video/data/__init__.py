"""Data on disk: prompt files, prompt and video shards, reward priors, images and videos."""
