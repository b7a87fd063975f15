"""What people look at: the page of a run, its curves and frames, and what its numbers say in words."""
