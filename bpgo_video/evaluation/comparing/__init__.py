"""Several models on the same prompts and noise: paired statistics, a verdict, and a page."""
