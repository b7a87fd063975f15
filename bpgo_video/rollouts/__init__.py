"""Rollouts of a policy, and the losses on them: sample videos, record transitions, replay them with gradients."""
