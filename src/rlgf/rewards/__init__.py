"""Rewards: functions of prompts and completions that return a score each."""
