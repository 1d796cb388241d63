"""The pipeline from a config to a finished run: checks, stages, training, final evaluation."""
