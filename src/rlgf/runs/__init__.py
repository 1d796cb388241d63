"""The run directory, rollout records, trackers, profiles and the machine."""
