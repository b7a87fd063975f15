"""A policy at work: videos sampled, and what they teach recorded; their transitions again, with gradients."""
