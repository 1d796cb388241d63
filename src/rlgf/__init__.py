"""Reinforcement learning from guided feedback: a policy and a guide take turns writing; the policy learns to win."""

__version__ = "0.1.0"
