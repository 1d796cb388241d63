"""Text metrics for files, evaluations and rewards."""
