"""Ranks together: the mesh, sequence parallelism, agreement, and what happens when one of them dies."""
