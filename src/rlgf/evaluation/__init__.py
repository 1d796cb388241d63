"""Evaluation of policies and guides on held-out prompts."""
