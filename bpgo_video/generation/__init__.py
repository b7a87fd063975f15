"""Videos from a finished policy, by its own pipeline and scheduler, in mp4 files."""
