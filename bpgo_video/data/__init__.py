"""What goes in and out of a run on disk: prompt shards, reward priors and video files."""
