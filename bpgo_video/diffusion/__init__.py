"""Paths of diffusion, as pure functions: noise levels, samplers as Gaussian steps, which steps train, flow matching."""
