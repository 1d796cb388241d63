"""The reinforcement-learning iteration: rollout, experience, update."""
